"""The member that loses least within a budget: what `search --budget` and `extract --budget` share."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.progress import progress_bar
from train.commands.common import check_at_least, check_data, check_file
from train.commands.console import make_console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from torch import Tensor

    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity
    from models.measure.latency import LatencyTable
    from train.search.budgets import Budget, Cost
    from train.search.found import Result
    from train.search.space import Space

MAX_SEQUENCE_LENGTH = 1024
MAX_CONTEXT = 1024
"""Positions whose keys and values count in memory, if the model has as many."""

BudgetOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND=AMOUNT",
        help="The most that the member may take: params=0.5 (of the full model), params=3M, bytes=40MB, "
        "flops=8M (a token), latency=12ms, memory=60MB; repeatable.",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        help="Engine that must hold the member: hf, padded, vllm, sglang, llama.cpp or mlx.",
    ),
]
LatencyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Table of latencies to count with, from the JSON of an earlier search. Default: this machine's.",
    ),
]
EvaluationsOption = Annotated[
    int, typer.Option(help="Number of members to measure, at most, beside probes and uniform ones.")
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a search under budgets."""

    budgets: Sequence[str]
    data: str | None
    text_field: str | None = None
    engine: str | None = None
    latency_table: Path | None = None
    gguf_dtype: str | None = None
    """Dtype of the matrices of the file that is to come out, if it is one for llama.cpp."""
    packed_dtype: str | None = None
    """Dtype of the matrices of the folder that is to come out, if they are packed."""
    max_tokens: int = 16384
    evaluations: int = 60

    def check(self) -> "list[Budget]":
        """Return the budgets.

        Raises:
            UsageError: before a model is opened, for what cannot be.
        """
        from train.search.budgets import ENGINES, parse_budgets

        budgets = parse_budgets(self.budgets)
        if self.data is None:
            raise UsageError("--data is missing: members are compared on a text; give the file of one")
        check_data(self.data)
        check_at_least(1, max_tokens=self.max_tokens, evaluations=self.evaluations)
        if self.engine is not None and self.engine not in ENGINES:
            raise UsageError(f"--for {self.engine} is not known; choose from {', '.join(ENGINES)}")
        if self.latency_table is not None:
            check_file("--latency-table", self.latency_table)
            if all(one.kind != "latency" for one in budgets):
                raise UsageError(
                    f"--latency-table {self.latency_table} counts in --budget latency=...; give one, or "
                    "leave it out"
                )
        return budgets


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a search under budgets found, and how it counted."""

    result: "Result"
    kind: str
    fields: dict[str, Any]


def choose(path: Path, request: Request, *, console: "Console | None" = None) -> Chosen:
    """Search for the member of a model folder that loses least within the budgets.

    Raises:
        UsageError: if no member keeps them, or the engine holds none.
    """
    budgets = request.check()
    from models.checkpoint.gguf import BLOCK, BLOCKS
    from models.measure.token_losses import TokenLosses, losses_path
    from train.commands.latency import time_member
    from train.search.budgets import holds_unequal
    from train.search.members import MemberSearch
    from train.search.space import Space

    assert request.data is not None
    folder, batches = open_text(path, request.data, request.text_field, request.max_tokens)
    losses = TokenLosses(folder.model, batches, losses_path(folder.path, batches, "fp32"))
    config = folder.model.config
    unequal = holds_unequal(request.engine, config)
    multiple = BLOCK if request.packed_dtype or request.gguf_dtype in BLOCKS else 8
    space = Space.of(config, folder.family.values(), unequal=unequal, multiple=multiple)
    with progress_bar("searching", console=console or make_console(stderr=True)) as bar:
        costs, table = _costs(folder, budgets, space, _weight_bytes(path), request)
        search = MemberSearch(losses, folder.family, space, budgets, costs, bar.show)
        result = search.run(request.evaluations)
        seconds = None
        if table is not None and request.latency_table is None and result.best is not None:
            bar.show("decoding with the chosen member", 0, 1)
            seconds = time_member(folder, result.best.member, table.dtype)
    kind = budgets[0].kind
    settings = {
        "model": str(path),
        "data": request.data,
        "num_tokens": losses.num_tokens,
        "for": request.engine,
    }
    settings |= {"budgets": [one.text for one in budgets], "latency": table and table.to_json()}
    settings |= {"measured_latency": seconds}
    return Chosen(result=result, kind=kind, fields={**search_fields_of(result, kind), **settings})


def open_text(
    path: Path, data: str, text_field: str | None, num_tokens: int
) -> "tuple[ModelFolder, list[tuple[Tensor, Tensor]]]":
    """Return a model folder in fp32, on the GPU if there is one, and tokens and labels of a text."""
    from train.commands.common import open_for_measuring
    from train.data.loader import take_batches
    from train.data.tokens import load_rows_for

    folder, _ = open_for_measuring(path, "fp32")
    rows = load_rows_for(folder, data, longest=MAX_SEQUENCE_LENGTH, text_field=text_field)
    return folder, list(take_batches(rows, num_tokens))


def stored_dtype(path: Path) -> str:
    """Return the dtype of the weights that a folder keeps."""
    from models.base.dtypes import DTYPES
    from models.base.files import read_json

    fields = read_json(path / "config.json") if path.is_dir() else {}
    stored = str(fields.get("dtype") or fields.get("torch_dtype") or "float32")
    return next((name for name, one in DTYPES.items() if str(one) == f"torch.{stored}"), "fp32")


def _weight_bytes(path: Path) -> int:
    from models.base.dtypes import DTYPES

    return DTYPES[stored_dtype(path)].itemsize


def search_fields_of(result: "Result", kind: str) -> dict[str, Any]:
    """Return what was found, for JSON."""
    from train.search.member_results import search_fields

    return search_fields(result, kind)


def show(chosen: Chosen, console: "Console") -> None:
    """Show the members that were measured, and the one that was chosen."""
    from train.search.member_results import LEGEND, describe, member_table

    console.print(member_table(chosen.result, chosen.kind).to_rich(caption=LEGEND))
    for line in describe(chosen.result):
        console.print(line, markup=False)
    if (table := chosen.fields["latency"]) is not None:
        where = f"{table['machine']}, {table['dtype']}"
        console.print(f"latencies are of {where}; off by {table['residual']:.0%} when checked", markup=False)
    if (seconds := chosen.fields["measured_latency"]) is not None and chosen.result.best is not None:
        error = chosen.result.best.costs["latency"] / seconds - 1
        console.print(f"measured in place: {seconds * 1e3:.3g} ms a token; the table is off by {error:+.0%}")


def _costs(
    folder: "ModelFolder", budgets: "Sequence[Budget]", space: "Space", weight_bytes: int, request: Request
) -> "tuple[Mapping[str, Cost], LatencyTable | None]":
    """Return what members cost in each kind of the budgets, and the table of latencies if one counts."""
    from train.commands.latency import latency_table
    from train.search.budgets import cost_of

    config, table = folder.model.config, None
    context = min(config.max_position_embeddings, MAX_CONTEXT)
    costs: dict[str, Cost] = {}
    stored = None
    if request.gguf_dtype is not None:
        stored = functools.partial(_file_bytes, folder, request.gguf_dtype)
    elif request.packed_dtype is not None:
        stored = functools.partial(_packed_bytes, folder, request.packed_dtype, weight_bytes)
    for kind in [one.kind for one in budgets]:
        if kind == "latency":
            table = latency_table(folder, space, request.latency_table)
            costs[kind] = functools.partial(table.seconds, config)
        else:
            costs[kind] = cost_of(kind, config, weight_bytes=weight_bytes, context=context, stored=stored)
    return costs, table


def _file_bytes(folder: "ModelFolder", dtype: str, member: "Granularity") -> float:
    from models.checkpoint.gguf import count_file_bytes
    from models.elastic.view import View

    return count_file_bytes(View(folder.model, member), dtype)


def _packed_bytes(folder: "ModelFolder", dtype: str, weight_bytes: int, member: "Granularity") -> float:
    """Return the bytes of a folder; the search's own copy is in fp32, whose numbers have other sizes."""
    from models.checkpoint.compressed import count_compressed_bytes
    from models.checkpoint.layout import lay_out
    from models.elastic.view import View

    return count_compressed_bytes(lay_out(View(folder.model, member)), dtype, weight_bytes)
