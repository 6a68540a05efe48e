"""Describes the settings of a section, what they take and mean: for its help and its error messages.

A section is a frozen pydantic dataclass with `config=CHECKED`. A field's type and bounds are what it takes,
and the docstring below it is its help.
"""

import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

CHECKED = ConfigDict(
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
    validate_by_name=True,
)
"""Pydantic refuses what is unknown, text in place of a number, and what is infinite."""


@dataclass(frozen=True)
class SettingHelp:
    """One row of the help: the key of a setting, what it takes, its default, what it means."""

    key: str
    type: str
    default: str
    help: str


def help_rows(section: type, prefix: str = "") -> list[SettingHelp]:
    """Return every setting of a section and of those inside it, in the order of their definition."""
    assert is_pydantic_dataclass(section)
    rows = []
    for name, field in section.__pydantic_fields__.items():
        key, default = f"{prefix}{field.alias or name}", field.get_default(call_default_factory=True)
        if is_pydantic_dataclass(type(default)):
            rows += help_rows(type(default), f"{key}.")
        else:
            text = " ".join((field.description or "").split())
            kind = takes(field.annotation, field.metadata)
            rows.append(SettingHelp(key, kind, show(default, limit=200), text))
    return rows


def as_table(section: Any) -> dict[str, Any]:
    """Return the values of a section by their keys, sections inside it as tables."""
    table: dict[str, Any] = TypeAdapter(type(section)).dump_python(section, by_alias=True)
    return table


def takes(hint: Any, metadata: Iterable[Any] = ()) -> str:
    """Say what values fit a type hint and its bounds.

    >>> from typing import Annotated
    >>> from pydantic import Field
    >>> takes(Annotated[float, Field(gt=0, le=1)]), takes(Literal["a", "b"]), takes(dict[str, str] | None)
    ('number in (0, 1]', 'one of a, b', 'table of text or null')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return takes(arguments[0], hint.__metadata__)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(takes(one, metadata) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is dict:
        return f"table of {takes(arguments[1])}"
    if origin is tuple:
        return f"list of {len(arguments)}, each a {takes(arguments[0])}"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(hint, "null") + _interval(metadata)


def show(value: Any, limit: int = 60) -> str:
    """Write a value as YAML reads it, cut to a limit.

    >>> show({"S": "ffn=0.5"}), show((0.9, 0.95)), show(None), show(True), show("x" * 9, limit=6)
    ('{S: ffn=0.5}', '[0.9, 0.95]', 'null', 'true', 'xxx...')
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, Mapping):
        text = text.replace('"', "")
    text = text if text.isprintable() else json.dumps(text, ensure_ascii=False)  # in one line
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _interval(metadata: Iterable[Any]) -> str:
    """Return the bounds among a field's metadata as an interval; nothing if it has none."""
    bounds: dict[str, Any] = {}
    for one in metadata:
        for mark in one.metadata if isinstance(one, FieldInfo) else [one]:
            bounds |= {name: getattr(mark, name) for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)}
    if not bounds:
        return ""
    low = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds.get('gt', '-inf')}"
    high = f"{bounds['le']}]" if "le" in bounds else f"{bounds.get('lt', 'inf')})"
    return f" in {low}, {high}"
