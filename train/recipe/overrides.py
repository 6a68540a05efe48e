"""Read and write a section of settings: defaults <- YAML files, in order <- `a.b=c` overrides.

OmegaConf reads and merges them and resolves `${other.key}`, pydantic validates the result. Unknown keys are
refused with the nearest right one, wrong values with what was expected; all of them at once.
"""

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from models.base.errors import UsageError
from models.base.files import write_text
from train.recipe.settings import as_table, help_rows, show

if TYPE_CHECKING:
    from omegaconf import DictConfig

S = TypeVar("S")
REFERENCES = "a value may refer to another key, as in ${trainer.max_steps}, or to ${oc.env:NAME}"


@dataclass(frozen=True)
class Given:
    """A value as YAML reads it, and as it was given: in a file, or as text on the command line."""

    value: Any
    text: str
    origin: str = ""


def load(
    section: type[S],
    configs: Sequence[Path],
    overrides: Sequence[str],
    *,
    renamed: Mapping[str, str],
    dials: Collection[str] = (),
    saved: bool = False,
    implied: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> S:
    """Make a section from its defaults, then the files, then the overrides (see `pair_overrides`).

    A table of free names (a family) in a file replaces the whole table before it; an override changes
    one entry, and `null` removes one.

    Args:
        section: The section to make.
        configs: YAML files, each of which wins over those before it.
        overrides: Words of the command line.
        renamed: The new key of each setting that had another one in an earlier release.
        dials: Names that are no settings, but that the command line takes.
        saved: whether the files were written by `save`, maybe of an earlier release: old keys are read.
        implied: maps the merged tables to defaults, by dotted key, that follow from them.

    Raises:
        UsageError: one line for each key that is unknown and each value that does not fit.
    """
    from omegaconf import OmegaConf

    takes = {row.key: row.type for row in help_rows(section)}
    given = _given(takes, configs, overrides, renamed if saved else {})
    unknown = [key for key in given if key not in takes and "table" not in takes.get(_parent(key), "")]
    problems = [_unknown(takes, key, given.pop(key), renamed, dials) for key in unknown]
    try:
        config = _merge(section, {}, given)
        if implied is not None:
            config = _merge(section, implied(_tables(config)), given)
        made, wrong = _validate(section, _tables(config), given)
        texts = {key: given[key].text for key in wrong if key in given and not given[key].origin}
        for key, text in texts.items():  # text needs no quotes on the command line: name=2024 is text, too
            OmegaConf.update(config, key, text, merge=False)
        if texts:
            made, wrong = _validate(section, _tables(config), given)
    except _yaml_errors() as error:
        raise UsageError(_unresolved(error, given)) from None
    problems += [line or _unfit(takes, key, given) for key, line in wrong.items()]
    if made is None or problems:
        raise UsageError("\n".join(problems))
    return made


def save(section: Any, path: Path) -> None:
    """Write every setting as YAML that `load` reads back equal; the file is complete or absent."""
    from omegaconf import OmegaConf

    write_text(path, OmegaConf.to_yaml(OmegaConf.create(as_table(section))))


def pair_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Read `a.b=c`, `--a.b=c` and `--a.b c`.

    Raises:
        UsageError: for a word that has none of these forms.

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
        if any("\ud800" <= one <= "\udfff" for one in key + text):  # bytes that Python could not decode
            raise UsageError(f"{key}={text!r}: is not UTF-8, as a recipe must be; give a path through a link")
        yield key, text


def _given(
    takes: Mapping[str, str], configs: Sequence[Path], overrides: Sequence[str], renamed: Mapping[str, str]
) -> dict[str, Given]:
    """Return the values of files and overrides by dotted key, in the order in which they are merged."""
    given: dict[str, Given] = {}
    for path in configs:
        for key, value in _leaves(takes, _read_yaml(path)):
            given[renamed.get(key, key)] = Given(value, show(value), f" in {path}")
    for key, text in pair_overrides(overrides):
        given.pop(key, None)  # the last word on the command line is merged last
        given[key] = Given(_parse_yaml(text), text)
    return given


def _merge(section: type, implied: Mapping[str, Any], given: Mapping[str, Given]) -> "DictConfig":
    """Return the defaults, then what is implied, then what is given, as OmegaConf holds them."""
    from omegaconf import OmegaConf

    config: DictConfig = OmegaConf.create(
        TypeAdapter(section).dump_python(section(), mode="json", by_alias=True)
    )
    for key, value in [*implied.items(), *((key, one.value) for key, one in given.items())]:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    return config


def _tables(config: "DictConfig") -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def _leaves(
    takes: Mapping[str, str], loaded: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a file; an empty section has none."""
    for name, value in loaded.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping | None) and any(setting.startswith(f"{key}.") for setting in takes):
            yield from _leaves(takes, value or {}, f"{key}.")
        else:
            yield key, value


def _validate(
    section: type[S], values: Any, given: Mapping[str, Given]
) -> tuple[S | None, dict[str, str | None]]:
    """Return the section, or a line for each key that does not fit; None where only its type is wrong."""
    try:
        return TypeAdapter(section).validate_json(json.dumps(values)), {}  # as JSON, a list is a tuple
    except ValidationError as error:
        wrong: dict[str, str | None] = {}
        for one in error.errors():
            path = ".".join(map(str, one["loc"]))
            keys = [key for key in given if f"{path}.".startswith(f"{key}.")]
            contradiction = one.get("ctx", {}).get("error")  # raised by a check of ours
            wrong[max(keys, key=len, default=path)] = contradiction and str(contradiction)
        return None, wrong


def _unresolved(error: Exception, given: Mapping[str, Given]) -> str:
    """Name the key whose `${...}` cannot be resolved, as it was given."""
    key, reason = getattr(error, "full_key", None) or "recipe", str(error).splitlines()[0]
    inside = [one for one in given if f"{key}.".replace("[", ".").startswith(f"{one}.")]
    if not inside:
        return f"{key}: {reason}; {REFERENCES}"
    one = given[max(inside, key=len)]
    return f"{key}={show(one.text)}{one.origin}: {reason}; {REFERENCES}"


def _unfit(takes: Mapping[str, str], key: str, given: Mapping[str, Given]) -> str:
    expected = takes.get(key) or takes[_parent(key)].removeprefix("table of ")
    return f"{key}={show(given[key].text)}{given[key].origin}: expected {expected}"


def _unknown(
    takes: Mapping[str, str], key: str, given: Given, renamed: Mapping[str, str], dials: Collection[str]
) -> str:
    shown = f"{show(key)}={show(given.text)}{given.origin}"
    if key in renamed:
        return f"{shown}: is now called {renamed[key]}"
    if key in dials:
        return f"{shown}: is a dial; give it on the command line"
    inside = [known for known in takes if known.startswith(f"{key}.")]
    if inside:
        return f"{shown}: is a section; set its keys, as in {inside[0]}"
    by_name = {known.rpartition(".")[2]: known for known in reversed([*dials, *takes])}
    group, _, last = key.rpartition(".")
    name = difflib.get_close_matches(last, by_name, 1)
    near = difflib.get_close_matches(key, takes, 1, 0.8) or [by_name[one] for one in name]
    siblings = [known.rpartition(".")[2] for known in takes if group and known.startswith(f"{group}.")]
    others = f"{group} has {', '.join(siblings)}" if siblings else "see `nestling train --help-all`"
    return f"{shown}: is not a setting; {f'did you mean {near[0]}?' if near else others}"


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


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
        if key := getattr(error, "full_key", None):
            reason = str(error).splitlines()[0]
            raise UsageError(f"--config {path}: {key}: {reason}; {REFERENCES}") from None
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: is not a YAML recipe: {reason}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {path}: is a list; a recipe has sections, as in `seed: 1`")
    return {str(key): value for key, value in loaded.items()}


def _yaml_errors() -> tuple[type[Exception], ...]:
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    # OmegaConf raises OSError for a file that holds neither a table nor a list
    return (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError)
