"""Settings that check and explain themselves.

A section is a frozen dataclass on top of `Section`; each field is a `setting(default, help, within=...)`.
The field's type, help and interval are written once: they check values, word the error messages, and
are the help of the command line. `train/recipe/overrides.py` reads sections from files and flags.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from models.base.errors import UsageError

T = TypeVar("T")


def setting(default: T, text: str, *, within: str = "") -> T:
    """A field of a section.

    Args:
        default: its default; a dict is copied for each instance.
        text: what it is, one line: the help.
        within: for numbers, the interval that they must be in: `(0, 1]`, `[1, inf)`.
    """
    metadata = {"help": text, "within": within}
    if isinstance(default, dict):
        return typing.cast(T, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings. However it is made, its values fit their types and intervals.

    Raises:
        UsageError: one line for each value that does not.
    """

    def __post_init__(self) -> None:
        problems = []
        for name, kind in kinds(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind.fit(value))
            except UnfitError:
                problems.append(f"{name}={show(value)}: expected {kind}")
        if problems:
            raise UsageError("\n".join(problems))


@dataclass(frozen=True)
class Kind:
    """What one setting takes, and its help."""

    hint: Any
    within: str = ""
    help: str = ""

    @property
    def section(self) -> type[Section] | None:
        """The section that it is, if it is one."""
        is_section = isinstance(self.hint, type) and issubclass(self.hint, Section)
        return self.hint if is_section else None

    @property
    def entry(self) -> "Kind | None":
        """What one entry takes, if it is a table of free names; null removes an entry."""
        for hint in _options(self.hint):
            if typing.get_origin(hint) is dict:
                return Kind(typing.get_args(hint)[1] | None, self.within)
        return None

    def fit(self, value: Any) -> Any:
        """The value in this type: 1 becomes 1.0, a list a tuple.

        Raises:
            UnfitError: if it does not fit.
        """
        fitted = _fit(value, self.hint)
        if not all(is_within(number, self.within) for number in _numbers(fitted)):
            raise UnfitError
        return fitted

    def __str__(self) -> str:
        text = " or ".join(_describe(option) for option in _options(self.hint))
        return f"{text} in {self.within}" if self.within else text


class UnfitError(Exception):
    """A value is not what a setting takes."""


def kinds(section: type[Section]) -> dict[str, Kind]:
    """What each field of a section takes, in the order of their definition."""
    hints = typing.get_type_hints(section)
    return {item.name: Kind(hints[item.name], **item.metadata) for item in dataclasses.fields(section)}


@dataclass(frozen=True)
class SettingHelp:
    """One row of the help: where a setting is, what it takes, its default, what it is."""

    key: str
    type: str
    default: str
    help: str


def help_rows(section: type[Section], prefix: str = "") -> list[SettingHelp]:
    """Every setting of a section and of those inside it, in the order of their definition."""
    rows = []
    for name, kind in kinds(section).items():
        if kind.section:
            rows += help_rows(kind.section, f"{prefix}{name}.")
        else:
            default = show(getattr(section(), name), limit=200)
            rows.append(SettingHelp(f"{prefix}{name}", str(kind), default, kind.help))
    return rows


def show(value: Any, limit: int = 60) -> str:
    """A value as one would write it, cut to a limit.

    >>> show({"S": "ffn=0.5"}), show((0.9, 0.95)), show(None), show(True), show("x" * 9, limit=6)
    ('{S: ffn=0.5}', '[0.9, 0.95]', 'null', 'true', 'xxx...')
    """
    if isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(show(item) for item in value)}]"
    elif value is None:
        text = "null"
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def is_within(number: float, interval: str) -> bool:
    """Whether a number is in an interval; an empty text is no limit.

    >>> [is_within(number, "(0, 1]") for number in (0, 0.5, 1, 2)]
    [False, True, True, False]
    """
    if not interval:
        return True
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number > low or (interval[0] == "[" and number == low)
    return above and (number < high or (interval[-1] == "]" and number == high))


def _fit(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(_options(hint)) > 1:
        return _fit_first(value, arguments)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _fit(v, arguments[1]) for k, v in value.items() if v is not None}
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_fit(item, argument) for item, argument in zip(value, arguments, strict=True))
    return _fit_scalar(value, hint)


def _fit_first(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _fit(value, hint)
        except UnfitError:
            continue
    raise UnfitError


def _fit_scalar(value: Any, hint: Any) -> Any:
    if hint in (bool, str, types.NoneType) and isinstance(value, hint):
        return value
    if hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if hint is float and math.isfinite(value):
            return float(value)
        if hint is int and float(value).is_integer():  # 1e4 is a number of steps, too
            return int(value)
    if isinstance(hint, type) and issubclass(hint, Section) and isinstance(value, hint):
        return value
    raise UnfitError


def _numbers(value: Any) -> list[float]:
    items = list(value.values()) if isinstance(value, dict) else value
    items = items if isinstance(items, list | tuple) else [items]
    return [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]


def _options(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _describe(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(arguments)}"
    if typing.get_origin(hint) is dict:
        return f"table of {_describe(arguments[1])}"
    if typing.get_origin(hint) is tuple:
        return f"list of {len(arguments)}, each a {_describe(arguments[0])}"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(hint, "null")
