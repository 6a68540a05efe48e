"""Read and write a section of settings: defaults <- YAML files, in order <- `a.b=c` overrides.

Unknown keys are refused with the nearest right one, wrong values with what was expected; all of them at
once. OmegaConf reads the YAML and resolves `${other.key}`.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from models.base.errors import UsageError
from models.base.files import write_text
from train.recipe.settings import Kind, Section, UnfitError, help_rows, kinds, show

S = TypeVar("S", bound=Section)


def load(section: type[S], configs: Sequence[Path], overrides: Sequence[str]) -> S:
    """Make a section from its defaults, then the files, then the overrides (see `pair_overrides`).

    A table of free names (a family) in a file replaces the whole table before it; an override changes
    one entry, and `null` removes one.

    Raises:
        UsageError: one line for each key that is unknown and each value that does not fit.
    """
    given: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for path in configs:
        leaves = dict(_leaves(section, _read_yaml(path)))
        given |= leaves
        origins |= dict.fromkeys(leaves, f" in {path}")
    for key, text in pair_overrides(overrides):
        given.pop(key, None)  # the last word on the command line is the last to be put
        given[key] = _parse(text, _find(section, key))
        origins.pop(key, None)

    unknown = [key for key in given if _find(section, key) is None]
    problems = [_unknown(section, key, f"{key}={show(given[key])}{origins.get(key, '')}") for key in unknown]
    values = dataclasses.asdict(section())
    for key, value in given.items():
        if key not in unknown:
            _put(values, key, value)
    made = _make(section, _resolve(values), problems, origins)
    if made is None:
        raise UsageError("\n".join(problems))
    return made


def save(section: Section, path: Path) -> None:
    """Write every setting as YAML that `load` reads back as an equal section; the file is whole or absent."""
    from omegaconf import OmegaConf

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(section))))


def pair_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Read `a.b=c`, `--a.b=c` and `--a.b c`.

    Raises:
        UsageError: for a word that is none of these.

    >>> list(pair_overrides(["seed=1", "--family.S=ffn=0.5", "--family.M", "ffn=0.75"]))
    [('seed', '1'), ('family.S', 'ffn=0.5'), ('family.M', 'ffn=0.75')]
    """
    rest = iter(words)
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        if key and not equals and word.startswith("--"):
            text = next(rest, "--")
            if text.startswith("--"):
                raise UsageError(f"{word}: has no value; write {word}=VALUE")
        elif not key or not equals:
            raise UsageError(f"{word}: is not an override; write KEY=VALUE, as in seed=1")
        if not _is_utf8(key + text):
            raise UsageError(f"{key}={text!r}: is not UTF-8, as a recipe must be; give a path through a link")
        yield key, text


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _make(
    section: type[S], values: Mapping[str, Any], problems: list[str], origins: Mapping[str, str]
) -> S | None:
    """The section, or None after telling its problems."""
    fields = _fields(section, values, "", problems, origins)
    return None if problems else section(**fields)


def _fields(
    section: type[Section],
    values: Mapping[str, Any],
    prefix: str,
    problems: list[str],
    origins: Mapping[str, str],
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, kind in kinds(section).items():
        key, value = f"{prefix}{name}", values[name]
        if kind.section:
            inner = _fields(kind.section, value, f"{key}.", problems, origins)
            if not problems:
                fields[name] = kind.section(**inner)
            continue
        try:
            fields[name] = kind.fit(value)
        except UnfitError:
            problems.append(f"{key}={show(value)}{origins.get(key, '')}: expected {kind}")
    return fields


def _leaves(section: type[Section], loaded: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of what a file says; an empty section says nothing."""
    for name, value in loaded.items():
        kind = kinds(section).get(name)
        if kind and kind.section and isinstance(value, Mapping | None):
            yield from _leaves(kind.section, value or {}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _find(section: type[Section], key: str) -> Kind | None:
    """What the setting at a dotted key takes; None if there is no such setting."""
    name, _, rest = key.partition(".")
    kind = kinds(section).get(name)
    if kind is None:
        return None
    if kind.section:
        return _find(kind.section, rest)
    return kind.entry if rest else kind


def _unknown(section: type[Section], key: str, shown: str) -> str:
    known = [row.key for row in help_rows(section)]
    inside = [row for row in known if row.startswith(f"{key}.")]
    if inside:
        return f"{shown}: is a section; set its keys, as in {inside[0]}"
    by_name = {row.rpartition(".")[2]: row for row in reversed(known)}
    name = difflib.get_close_matches(key.rpartition(".")[2], by_name, 1)
    near = difflib.get_close_matches(key, known, 1, 0.8) or [by_name[one] for one in name]
    group = key.rpartition(".")[0]
    siblings = [row.rpartition(".")[2] for row in known if group and row.startswith(f"{group}.")]
    others = f"{group} has {', '.join(siblings)}" if siblings else "`nestling train --help` lists all keys"
    remedy = f"did you mean {near[0]}?" if near else others
    return f"{shown}: is not a setting; {remedy}"


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # a table that is null by default
            values[parent] = {}
        values = values[parent]
    values[last] = value


def _parse(text: str, kind: Kind | None) -> Any:
    """An override's value: what YAML reads if that fits, else the text as it stands if that does."""
    value = _parse_yaml(text)
    for candidate in (value, text):
        try:
            if kind is not None:
                kind.fit(candidate)
                return candidate
        except UnfitError:
            continue
    return value


def _parse_yaml(text: str) -> Any:
    from omegaconf import OmegaConf

    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except _yaml_errors():
        return text
    return loaded["value"]


def _read_yaml(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except _yaml_errors() as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: is not a YAML recipe: {reason}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {path}: is a list; a recipe has sections, as in `seed: 1`")
    return {str(key): value for key, value in loaded.items()}


def _resolve(values: dict[str, Any]) -> dict[str, Any]:
    """Replace each `${other.key}` by that key's value."""
    from omegaconf import OmegaConf

    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except _yaml_errors() as error:
        raise UsageError(f"recipe: {str(error).splitlines()[0]}") from None
    return dict(resolved)


def _yaml_errors() -> tuple[type[Exception], ...]:
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    # OmegaConf raises OSError for a file that holds neither a table nor a list
    return (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError)
