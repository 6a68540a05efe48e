"""What several commands share: arguments, and the checks that come before any long work."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import UsageError

if TYPE_CHECKING:
    from models.checkpoint import ModelFolder

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model folder: a run's model/, or any stock one.")
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="PATH", help="Also write the results to this file.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16|int8",
        help="Of the weights; auto takes the fastest of fp32 and bf16 here, int8 is another model.",
    ),
]


def check_file(flag: str, path: Path) -> None:
    """Raise UsageError unless `path` is a file that can be read."""
    if not path.exists():
        raise UsageError(f"{flag} {path} does not exist; give the path of a file")
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give the path of a file")
    if not os.access(path, os.R_OK):
        raise UsageError(f"{flag} {path} cannot be read; check its permissions")


def check_json(path: Path | None) -> None:
    """Say before the work, not after it, that the results could not be written."""
    _check_output("--json", path)


def check_plot(path: Path | None) -> None:
    """The same for a picture, whose kind its name tells."""
    _check_output("--plot", path)
    if path is not None and path.suffix not in PLOTS:
        raise UsageError(f"--plot {path} has no known ending; choose from {', '.join(PLOTS)}")


PLOTS = (".svg", ".png", ".html")


def _check_output(flag: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {path}: the folder {path.parent} cannot be written to; choose another")


def open_for_decoding(path: Path, dtype: str) -> "tuple[ModelFolder, str]":
    """Open a model folder, packed in the dtype (whose name is returned), with the fastest threads."""
    import dataclasses

    import torch

    from models.decode.auto import best_num_threads
    from models.machine import machine_card, num_threads
    from models.quantize import INT8, pack

    folder, name = _open(path, dtype)
    if name != INT8:  # which is packed already
        folder = dataclasses.replace(folder, model=pack(folder.model, name))
    most = num_threads(machine_card(), name, purpose="decoding")
    torch.set_num_threads(best_num_threads(folder.model, most))
    return folder, name


def open_for_measuring(path: Path, dtype: str) -> "tuple[ModelFolder, str]":
    """Open a model folder to run whole rows of text through it."""
    import torch

    from models.machine import machine_card, num_threads

    folder, name = _open(path, dtype)
    torch.set_num_threads(num_threads(machine_card(), name, purpose="training"))
    return folder, name


def _open(path: Path, dtype: str) -> "tuple[ModelFolder, str]":
    """Open a model folder in a dtype, whose name is returned; `auto` asks the machine card.

    An int8 model runs packed, on the CPU: its rows are scaled one by one, so that it has a law of its own.
    """
    import dataclasses

    from models.checkpoint import load_model
    from models.machine import machine_card, resolve_dtype
    from models.probe import DTYPES
    from models.quantize import INT8, pack

    card = machine_card()
    stored = "fp32" if dtype == INT8 else resolve_dtype(dtype, card, purpose="decoding")
    folder = load_model(path, dtype=DTYPES[stored])
    if dtype == INT8:
        return dataclasses.replace(folder, model=pack(folder.model, INT8)), INT8
    folder.model.to("cuda" if card.gpu else "cpu")
    return folder, stored


def write_results(path: Path | None, results: Mapping[str, Any], *, dtypes: Mapping[str, str]) -> None:
    """Write the results and the card of where they come from as one JSON object, if a path is given."""
    if path is None:
        return
    from models.card import make_card
    from models.files import write_json

    write_json(path, {**results, "card": make_card(dtypes=dtypes)})
