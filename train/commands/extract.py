"""`nestling extract`: cut one member out of a family, as a stock Hugging Face folder or for llama.cpp."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.outputs import check_apart
from train.commands.choose import BudgetOption, LatencyOption, Request, choose, show
from train.commands.common import JsonOption, ModelArgument, TextFieldOption, check_json, write_results
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity

FORMATS = ("hf", "gguf")


def extract(
    model: ModelArgument,
    *,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar="G",
            help="Member to cut out, or a granularity: ffn=0.25,heads=0.5,layers=0:3:5.",
        ),
    ] = None,
    budget: BudgetOption = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text on which members are compared for --budget."),
    ] = None,
    text_field: TextFieldOption = None,
    latency_table: LatencyOption = None,
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
    """Cut one member out, as a stock Hugging Face folder or a file for llama.cpp, and prove it equal.

    With --budget, the member is the one that loses least within it.
    """
    check_json(json, MODEL=model, out=out)
    check_apart({"--out": out}, {"MODEL": model})
    _check_one(granularity, budget)
    _check_format(format_, dtype, out)
    from models.checkpoint.folder import load_model
    from models.elastic.granularity import Granularity

    request = Request(
        budgets=budget or [],
        data=data,
        text_field=text_field,
        engine="padded",  # equal layers: the ones that are written here
        latency_table=latency_table,
    )
    search = {} if granularity else _choose(model, request)
    folder = load_model(model)
    member = Granularity.parse(granularity or search["best"]["granularity"], folder.family)
    named: dict[str, Any] = {"granularity": str(member), "out": str(out), "format": format_}
    named |= {"search": search} if search else {}
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


def _choose(model: Path, request: Request) -> dict[str, Any]:
    """Return what a search under a budget found, which is shown."""
    chosen = choose(model, request)
    show(chosen, make_console())
    return chosen.fields


def _check_one(granularity: str | None, budget: list[str] | None) -> None:
    if granularity and budget:
        raise UsageError(
            f"--granularity {granularity} and --budget {budget[0]} exclude each other; give one of them"
        )
    if not granularity and not budget:
        raise UsageError(
            "--granularity is missing: name a member, as in S, or give --budget, as in params=0.5"
        )
    for text in budget or []:
        if "=" not in text:
            raise UsageError(
                f"--budget {text} has no amount; write how much the member may take, as in {text}=0.5"
            )


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
