"""`nestling extract`: cut one member out of a family, as a stock Hugging Face folder or for llama.cpp."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.outputs import check_apart
from train.commands.choose import (
    BudgetOption,
    EngineOption,
    LatencyOption,
    Request,
    choose,
    show,
    stored_dtype,
)
from train.commands.common import check_data, check_json, write_results
from train.commands.console import make_console
from train.commands.options import JsonOption, ModelArgument, TextFieldOption

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity
    from train.commands.rounding import HeldOut

FORMATS = ("hf", "gguf")
PAIR_TOKENS = 16384
"""Tokens on which a pair is measured."""


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
    pair: Annotated[
        str | None,
        typer.Option(
            metavar="DRAFT:TARGET",
            help="Two members to cut out as a draft and its target, with lines that run them, as in D:XL.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text on which members are compared, for --budget and --pair, and a rounded one with the "
            "member in place.",
        ),
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
            help="Data type of the matrices. Of a gguf file, int8 is its q8_0 and int4 its q4_0; of a folder "
            "only int8 and int4, as compressed-tensors. Default: the one on disk.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier extraction that stands at --out.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Cut one member out, as a stock Hugging Face folder or a file for llama.cpp, and prove it equal.

    With --budget, the member is the one that loses least within it. With --pair, two members come out that
    run together in other engines.
    """
    check_json(json, MODEL=model, out=out)
    check_apart({"--out": out}, {"MODEL": model})
    _check_one(granularity, budget, pair, latency_table)
    form = _form_of(form, engine, format_)
    dtype = _check_format(format_, dtype, out)
    _check_out(out, force, format_, pair)
    if data is not None:
        check_data(data)
    if pair:
        _extract_pair(model, pair, out, (data, text_field), (engine, form, format_, dtype), json)
        return
    from models.checkpoint.folder import load_model
    from models.elastic.granularity import Granularity
    from train.commands.rounding import HeldOut

    request = Request(
        budgets=budget or [],
        data=data,
        text_field=text_field,
        engine=_engine_of(engine, format_, form),
        latency_table=latency_table,
        gguf_dtype=(dtype or stored_dtype(model)) if format_ == "gguf" else None,
        packed_dtype=dtype if format_ == "hf" else None,
    )
    search = {} if granularity else _choose(model, request)
    folder = load_model(model, mapped=True)
    member = Granularity.parse(granularity or search["best"]["granularity"], folder.family)
    _check_holds(engine, member, folder, form)
    text = None if data is None else HeldOut(source=data, text_field=text_field)
    named: dict[str, Any] = {"granularity": str(member), "out": str(out), "format": format_}
    named |= {"search": search} if search else {}
    if format_ == "gguf":
        results, dtypes = _write_file(folder, member, out, dtype, text)
    else:
        results, dtypes = _write_folder(folder, member, out, form, dtype, text, search)
    write_results(json, named | results, dtypes=dtypes)


def _write_folder(
    folder: "ModelFolder",
    member: "Granularity",
    out: Path,
    form: str | None,
    dtype: str | None,
    text: "HeldOut | None",
    search: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    from train.commands.export import extract_and_prove

    proved = extract_and_prove(
        folder, member, out, make_console(), form=form, dtype=dtype, text=text, search=search
    )
    written = dataclasses.asdict(proved)
    return {**written.pop("parity"), **written}, {"comparison": "fp32"}


def _write_file(
    folder: "ModelFolder",
    member: "Granularity",
    out: Path,
    dtype: str | None,
    text: "HeldOut | None",
) -> tuple[dict[str, Any], dict[str, str]]:
    from train.commands.export_gguf import extract_gguf

    written = extract_gguf(folder, member, out, make_console(), dtype=dtype, text=text)
    return dataclasses.asdict(written), {"weights": written.dtype}


def _choose(model: Path, request: Request) -> dict[str, Any]:
    """Return what a search under a budget found, which is shown."""
    chosen = choose(model, request)
    show(chosen, make_console())
    return chosen.fields


def _check_out(out: Path, force: bool, format_: str, pair: str | None) -> None:
    """Say before the work that something stands where the extraction would."""
    from models.base.files import check_replaceable, clear_interrupted
    from train.commands.export_gguf import check_file_replaceable
    from train.commands.pair import PAIR_FILE

    if pair:
        check_replaceable(out, marker=PAIR_FILE)
    elif format_ == "gguf":
        check_file_replaceable(out)
    else:
        check_replaceable(out)
    is_there = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if is_there and not force:
        raise UsageError(f"--out {out} exists; add --force to replace an extraction, or choose another place")
    clear_interrupted(out)


def _extract_pair(
    model: Path,
    text: str,
    out: Path,
    source: tuple[str | None, str | None],
    kind: tuple[str | None, str | None, str, str | None],
    json: Path | None,
) -> None:
    from models.checkpoint.folder import load_model
    from train.commands.choose import open_text
    from train.commands.pair import check_pair_room, measure_pair, parse_pair, tell_pair, write_pair

    data, text_field = source
    if data is None:
        raise UsageError(
            "--data is missing: how many drafted tokens are kept is measured on a text; give one"
        )
    check_data(data)
    console = make_console()
    folder, batches = open_text(model, data, text_field, PAIR_TOKENS)
    draft, target = parse_pair(text, folder)
    engine, form, format_, dtype = kind
    for member in (draft, target):
        _check_holds(engine, member, folder, form)
    stored = load_model(model, mapped=True)  # as it is on disk, which what is measured is not
    check_pair_room(stored, (draft, target), out, form=form, format_=format_, dtype=dtype)
    with console.status("measuring how they run together"):
        measured = measure_pair(folder, draft, target, batches)
    del folder
    fields = write_pair(stored, measured, out, console, form=form, format_=format_, dtype=dtype)
    tell_pair(fields, out, console)
    write_results(
        json, {"out": str(out), "pair": fields}, dtypes={"weights": fields["card"]["dtypes"]["model"]}
    )


def _engine_of(engine: str | None, format_: str, form: str | None) -> str | None:
    """Return the engine that must hold a member which is searched for."""
    if engine is None:
        return "llama.cpp" if format_ == "gguf" else "padded" if form in ("padded", "stock") else None
    return engine


def _check_holds(engine: str | None, member: "Granularity", folder: "ModelFolder", form: str | None) -> None:
    """Raise UsageError if an engine does not hold a member whose layers are unequal."""
    if engine is None:  # then the form says what it does not hold
        return
    from train.search.budgets import holds_unequal

    layers = member.resolve(folder.model.config).layers
    unequal_ffn = len({layer.ffn for layer in layers}) > 1
    unequal_heads = len({layer.groups for layer in layers}) > 1
    ffn, heads = holds_unequal(engine, folder.model.config)
    if form != "padded" and ((unequal_ffn and not ffn) or (unequal_heads and not heads)):
        raise UsageError(
            f"--for {engine} does not hold the unequal layers of {member}; "
            "take --form padded, or one fraction for all layers"
        )


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


def _check_one(
    granularity: str | None, budget: list[str] | None, pair: str | None, latency_table: Path | None
) -> None:
    flags = {"--granularity": granularity, "--budget": next(iter(budget or ()), None), "--pair": pair}
    given = [f"{name} {value}" for name, value in flags.items() if value]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other; give one of them")
    if not given:
        raise UsageError(
            "--granularity is missing: name a member, or give --budget or --pair "
            "(see nestling extract --help)"
        )
    if latency_table is not None and not budget:
        raise UsageError(f"--latency-table {latency_table} counts in --budget latency=...; leave it out")
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
        if out.suffix == ".gguf":
            raise UsageError(f"--out {out} would be a folder; add --format gguf, or choose another name")
        return _check_packed(dtype)
    from models.checkpoint.gguf import DTYPES, SPELLINGS

    dtype = SPELLINGS.get(dtype or "", dtype)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}; choose one of them")
    return dtype


def _check_packed(dtype: str | None) -> str | None:
    """Return the dtype of a folder's matrices, or None for the one on disk."""
    from models.checkpoint.compressed import BITS, check_installed

    if dtype is None:
        return None
    if dtype not in BITS:
        raise UsageError(
            f"--dtype {dtype} is for --format gguf; a folder keeps the dtype on disk, or is in "
            f"{' or '.join(BITS)}"
        )
    check_installed()
    return dtype
