"""`nestling extract`: cut one member out of a family, as a stock Hugging Face folder or for llama.cpp."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.outputs import check_apart
from train.commands.common import JsonOption, ModelArgument, check_json, write_results
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity

FORMATS = ("hf", "gguf")


def extract(
    model: ModelArgument,
    *,
    granularity: Annotated[
        str,
        typer.Option(
            metavar="G",
            help="Member to cut out, or a granularity: ffn=0.25,heads=0.5,layers=0:3:5.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="Folder to write, or file for gguf.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="hf|gguf",
            help="Output format: a stock Hugging Face folder, or one file for llama.cpp.",
        ),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|bf16|fp16|int8",
            help="Data type of the matrices in a gguf file; int8 is its Q8_0. Default: the one on disk.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Cut one member out, as a stock Hugging Face folder or a file for llama.cpp, and prove it equal."""
    check_json(json, MODEL=model, out=out)
    check_apart({"--out": out}, {"MODEL": model})
    _check_format(format_, dtype, out)
    from models.checkpoint.folder import load_model
    from models.elastic.granularity import Granularity

    folder = load_model(model)
    member = Granularity.parse(granularity, folder.family)
    named = {"granularity": str(member), "out": str(out), "format": format_}
    if format_ == "gguf":
        results, dtypes = _write_file(folder, member, out, dtype)
    else:
        results, dtypes = _write_folder(folder, member, out)
    write_results(json, named | results, dtypes=dtypes)


def _write_folder(
    folder: "ModelFolder", member: "Granularity", out: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    from train.commands.export import extract_and_prove

    parity = extract_and_prove(folder, member, out, make_console())
    return dataclasses.asdict(parity), {"comparison": "fp32"}


def _write_file(
    folder: "ModelFolder", member: "Granularity", out: Path, dtype: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    from train.commands.export import extract_gguf

    written = extract_gguf(folder, member, out, make_console(), dtype=dtype)
    return dataclasses.asdict(written), {"weights": written.dtype}


def _check_format(format_: str, dtype: str | None, out: Path) -> None:
    """Say before the weights are read what cannot be."""
    if format_ not in FORMATS:
        raise UsageError(f"--format {format_} is not one of {', '.join(FORMATS)}; choose one of them")
    if format_ == "hf":
        if dtype is not None:
            raise UsageError(f"--dtype {dtype} is for --format gguf; a folder keeps the dtype on disk")
        if out.suffix == ".gguf":
            raise UsageError(f"--out {out} would be a folder; add --format gguf, or choose another name")
        return
    from models.checkpoint.gguf import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}; choose one of them")
