"""What several commands do: the checks that come before any long work, and the results after it."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.base.errors import UsageError
from models.base.outputs import Paths, check_apart, check_output
from train.recipe.shipped import recipe_names

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder

PRINTED = Path("-")
"""The `--json` that prints the results."""


def check_file(flag: str, path: Path) -> None:
    """Raise UsageError unless `path` is a file that can be read."""
    if not path.exists():
        raise UsageError(f"{flag} {path} does not exist; give the path of a file")
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give the path of a file")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{flag} {path} cannot be read; check its permissions")


def check_recipes(paths: Sequence[Path]) -> None:
    """Raise UsageError unless each `--config` is a file that can be read; a name is compared with ours."""
    for path in paths:
        if not path.exists() and path.parent == Path() and path.suffix in ("", ".yaml"):
            near = get_close_matches(path.stem, recipe_names(), 1)
            meant = f"did you mean {near[0]}? Known are" if near else "give the path of a file, or one of"
            raise UsageError(f"--config {path} does not exist; {meant} {', '.join(recipe_names())}")
        check_file("--config", path)


def check_data(source: str) -> None:
    """Raise UsageError unless `--data` is a file that can be read, stdlib or a dataset of the hub."""
    if source != "stdlib" and not source.startswith("hub:"):
        check_file("--data", Path(source))


def check_gamma(text: str | None, *, least: int) -> int | Literal["auto"] | None:
    """Return what `--gamma` says; None without one."""
    if text is None or text == "auto":
        return None if text is None else "auto"
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"--gamma {text!r} is no number; give {least} or more, or auto") from None
    if number < least:
        raise UsageError(f"--gamma must be {least} or more, or auto, got {number}")
    return number


def check_at_least(least: int, **numbers: int) -> None:
    """Raise UsageError for a number below its bound; `num_prompts` is the value of `--num-prompts`."""
    for name, value in numbers.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def check_json(path: Path | None, **inputs: Paths) -> None:
    """Say before the work, not after it, that the results could not be written.

    Args:
        path: file of the results.
        inputs: what the command reads, which the results must not replace: `MODEL` or the name of a flag.
    """
    if path is not None and path != PRINTED:
        check_output("--json", path)
        check_apart({"--json": path}, name_flags(inputs))


def check_made_by(command: str, mark: str, out: Path) -> None:
    """Refuse to replace a model folder that another command made, which may have taken days.

    Args:
        command: whose folders may be replaced.
        mark: what its folders have in their provenance, and no others.
        out: the place of the new folder.

    Raises:
        UsageError: naming it, as for a place that holds something else.
    """
    from models.base.files import check_replaceable, read_json
    from models.checkpoint.family import FAMILY_FILE

    check_replaceable(out)
    if (out / FAMILY_FILE).is_file() and mark not in (read_json(out / FAMILY_FILE).get("provenance") or {}):
        raise UsageError(
            f"--out {out} holds a model that `{command}` did not make; choose another place or empty it"
        )


def name_flags(inputs: Mapping[str, Paths]) -> dict[str, Paths]:
    """Return the inputs by the names that a user gives them.

    >>> name_flags({"MODEL": "mine/model", "data": "text.txt"})
    {'MODEL': 'mine/model', '--data': 'text.txt'}
    """
    return {name if name.isupper() else f"--{name}": value for name, value in inputs.items()}


def draft_paths(drafts: list[str] | None) -> list[str]:
    """Return where the drafts would lie if they are folders, with their precision or without."""
    return [path for draft in drafts or [] for path in (draft, draft.partition("@")[0])]


def check_plot(path: Path | None, **inputs: Paths) -> None:
    """Say the same of a picture, whose kind its name tells."""
    if path is None:
        return
    check_output("--plot", path)
    check_apart({"--plot": path}, name_flags(inputs))
    if path.suffix not in PLOTS:
        raise UsageError(f"--plot {path} has no known ending; choose from {', '.join(PLOTS)}")


PLOTS = (".svg", ".png", ".html")


def open_for_measuring(path: Path, dtype: str) -> "tuple[ModelFolder, str]":
    """Open a model folder to run whole rows of text through it; the dtype's name is returned."""
    import torch

    from models.decode.open import open_in_dtype
    from models.machine.card import machine_card, num_threads

    folder, name = open_in_dtype(path, dtype)
    torch.set_num_threads(num_threads(machine_card(), name, purpose="training"))
    return folder, name


def write_results(path: Path | None, results: Mapping[str, Any], *, dtypes: Mapping[str, str]) -> None:
    """Write the results and the card of where they come from as one JSON object, if a path is given."""
    if path is not None:
        write_document(path, add_card(results, dtypes=dtypes))


def add_card(results: Mapping[str, Any], *, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return the results with the card of where they come from."""
    from models.machine.provenance import make_card

    return {**results, "card": make_card(dtypes=dtypes)}


def write_document(path: Path | None, document: Mapping[str, Any]) -> None:
    """Write results that have their card, if a path is given, or print them."""
    import json

    from models.base.files import finite, write_json

    if path == PRINTED:
        print(json.dumps(finite(document)))
    elif path is not None:
        write_json(path, document)
