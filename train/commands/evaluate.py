"""`nestling evaluate`: how well each member models a text, and how close it is to the full model."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.base.errors import NestlingError, UsageError
from models.base.progress import progress_bar
from train.commands.common import check_at_least, check_data, check_json, open_for_measuring, write_results
from train.commands.console import make_console
from train.commands.options import JsonOption, ModelArgument, TextFieldOption

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity

# Long enough for any model that was trained here; a stock one's context may be far longer than needed.
MAX_SEQUENCE_LENGTH = 1024


def evaluate(
    model: ModelArgument,
    *,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to measure on: a .txt, .jsonl or .parquet file, or stdlib."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Task of lm-evaluation-harness to score members on, or a YAML file of one; repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of documents of each task. By default all.")
    ] = None,
    text_field: TextFieldOption = None,
    granularity: Annotated[
        list[str] | None,
        typer.Option(metavar="G", help="Granularity to measure besides the family; repeatable."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Approximate number of tokens to measure on; 0 takes all.")
    ] = 100_000,
    dtype: Annotated[
        str, typer.Option(metavar="auto|file|fp32|bf16|int8", help="Data type of the weights.")
    ] = "fp32",
    json: JsonOption = None,
) -> None:
    """Measure every member of a family on a text: loss, perplexity, match, KL and alpha.

    With --tasks, score them on tasks of lm-evaluation-harness, in place.
    """
    check_json(json, MODEL=model, data=data, tasks=tasks)
    if tasks:
        _score_tasks(model, tasks, granularity or [], limit, dtype, json, data=data)
        return
    if data is None:
        raise UsageError("--data is missing: give a text, or --tasks (see nestling evaluate --help)")
    if limit is not None:
        raise UsageError(f"--limit {limit} goes with --tasks; for a text it is --max-tokens")
    check_data(data)
    if max_tokens < 0:
        raise UsageError(f"--max-tokens must be 0 (all) or more, got {max_tokens}")
    from models.measure.consistency import evaluate_family
    from train.data.loader import take_batches
    from train.data.tokens import load_rows_for
    from train.report.tables import FAMILY_LEGEND, family_table

    folder, dtype = open_for_measuring(model, dtype)
    members = choose_members(folder, granularity or [])
    rows = load_rows_for(folder, data, longest=MAX_SEQUENCE_LENGTH, text_field=text_field)
    console = make_console()
    with console.status("measuring"):
        batches = list(take_batches(rows, max_tokens or rows.num_labels))
        measured = evaluate_family(folder.model, members, batches)
    num_tokens = sum(int((labels_BT >= 0).sum()) for _, labels_BT in batches)
    title = f"{model} on {num_tokens:,} of {rows.num_labels:,} tokens of {data}, {dtype}"
    console.print(family_table(measured).to_rich(title=title, caption=FAMILY_LEGEND))
    results = {
        "members": [dataclasses.asdict(member) for member in measured],
        "data": data,
        "num_tokens": num_tokens,
        "sequence_length": rows.sequence_length,
    }
    write_results(json, results, dtypes={"model": dtype})


def _score_tasks(
    model: Path,
    tasks: list[str],
    granularities: list[str],
    limit: int | None,
    dtype: str,
    json: Path | None,
    *,
    data: str | None,
) -> None:
    """Score members on tasks of lm-evaluation-harness."""
    if data is not None:
        raise UsageError(f"--data {data} and --tasks {tasks[0]} are two measurements; give one of them")
    if limit is not None:
        check_at_least(1, limit=limit)
    from models.elastic.view import View
    from models.measure.harness import find_tasks, run_tasks
    from train.report.tables import task_table

    names, manager = find_tasks([name for text in tasks for name in text.split(",")])
    folder, dtype = open_for_measuring(model, dtype)
    if folder.tokenizer is None:
        raise NestlingError(f"{model} has no tokenizer.json, which tasks need; add it")
    family = choose_members(folder, granularities)
    members = {name: one for name, one in family.items() if not granularities or name in granularities}
    scores, console = {}, make_console()
    with progress_bar("scoring", len(members), console=make_console(stderr=True)) as bar:
        for name, one in members.items():
            view = View(folder.model, one)
            scores[name] = run_tasks(view, folder.tokenizer, names, manager, limit=limit)
            bar.advance()
    console.print(task_table(scores).to_rich(title=f"{model}, {dtype}"))
    results = {"tasks": scores, "granularities": {name: str(one) for name, one in members.items()}}
    write_results(json, results | {"limit": limit}, dtypes={"model": dtype})


def choose_members(folder: "ModelFolder", texts: list[str]) -> "dict[str, Granularity]":
    """Return the family and the members of these texts, by name; the largest last.

    Raises:
        UsageError: if one does not fit the model.
    """
    from models.elastic.count import count_parameters
    from models.elastic.granularity import Granularity

    members = {text: Granularity.parse(text, folder.family) for text in texts}
    members = {**folder.family, **{text: one for text, one in members.items() if text not in folder.family}}
    config = folder.model.config
    return dict(sorted(members.items(), key=lambda item: count_parameters(config, item[1])))
