"""`nestling extract`: cut one member out of a family, as a stock Hugging Face folder or for llama.cpp."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.outputs import check_apart
from train.commands.choose import BudgetOption, EngineOption, LatencyOption, Request, choose, show
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
    engine: EngineOption = None,
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
    form: Annotated[
        str | None,
        typer.Option(
            metavar="stock|ragged|padded",
            help="How a folder holds unequal layers: true shapes and a small modelling file (ragged, the "
            "default), or zeros up to the widest layer, without any code (padded).",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|bf16|fp16|int8|int4",
            help="Data type of the matrices in a gguf file; int8 is its q8_0, int4 its q4_0. "
            "Default: the one on disk.",
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
    form = _form_of(form, engine, format_)
    dtype = _check_format(format_, dtype, out)
    from models.checkpoint.folder import load_model
    from models.elastic.granularity import Granularity

    request = Request(
        budgets=budget or [],
        data=data,
        text_field=text_field,
        engine=_engine_of(engine, format_, form),
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
        results, dtypes = _write_folder(folder, member, out, form)
    write_results(json, named | results, dtypes=dtypes)


def _write_folder(
    folder: "ModelFolder", member: "Granularity", out: Path, form: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    from train.commands.export import extract_and_prove

    written = dataclasses.asdict(extract_and_prove(folder, member, out, make_console(), form=form))
    return {**written.pop("parity"), **written}, {"comparison": "fp32"}


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


def _engine_of(engine: str | None, format_: str, form: str | None) -> str | None:
    """Return the engine that must hold a member which is searched for."""
    if engine is None:
        return "llama.cpp" if format_ == "gguf" else "padded" if form in ("padded", "stock") else None
    return engine


def _form_of(form: str | None, engine: str | None, format_: str) -> str | None:
    """Return the form that an engine reads.

    Raises:
        UsageError: if the flags exclude each other.
    """
    from models.checkpoint.layout import FORMS
    from train.search.budgets import ENGINES

    if form is not None and form not in FORMS:
        raise UsageError(f"--form {form} is not one of {', '.join(FORMS)}; choose one of them")
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--for {engine} is not known; choose from {', '.join(ENGINES)}")
    if form is not None and format_ == "gguf":
        raise UsageError(f"--form {form} is for a folder; a gguf file has one form, leave it out")
    if engine == "llama.cpp" and format_ != "gguf":
        raise UsageError("--for llama.cpp reads one file; add --format gguf")
    if engine == "mlx" and form == "ragged":
        raise UsageError("--form ragged needs a modelling file, which --for mlx does not run; take padded")
    return form or ("padded" if engine in ("padded", "mlx") else None)


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


def _check_format(format_: str, dtype: str | None, out: Path) -> str | None:
    """Say before the weights are read what cannot be; return our name of the dtype."""
    if format_ not in FORMATS:
        raise UsageError(f"--format {format_} is not one of {', '.join(FORMATS)}; choose one of them")
    if format_ == "hf":
        if dtype is not None:
            raise UsageError(f"--dtype {dtype} is for --format gguf; a folder keeps the dtype on disk")
        if out.suffix == ".gguf":
            raise UsageError(f"--out {out} would be a folder; add --format gguf, or choose another name")
        return None
    from models.checkpoint.gguf import DTYPES, SPELLINGS

    dtype = SPELLINGS.get(dtype or "", dtype)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}; choose one of them")
    return dtype
