"""`nestling bench`: ours against transformers on the same weights, side by side; see models/bench/run.py."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.errors import UsageError
from train.commands.common import JsonOption, ModelArgument, check_file, check_json
from train.console import make_console

if TYPE_CHECKING:
    from models.bench.matrix import Target
    from models.bench.report import Row


def bench(
    model: ModelArgument,
    *,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G[@int8|bf16]|auto|none|DIR",
            help="What drafts: a member, the best one here, nothing, or another model folder; repeatable. "
            "Default: auto.",
        ),
    ] = None,
    gamma: Annotated[
        int | None, typer.Option(help="Drafted tokens a round. Default: auto's choice, or 4.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Prompts, one a line, as field prompt, turns or text."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Or a text: the first 32 tokens of its documents."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="At most so many prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write; ends of text are ignored.")] = 64,
    temperature: Annotated[
        list[float] | None, typer.Option(help="0 takes the likeliest token; repeatable. Default: 0.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="auto|fp32|bf16|int8", help="Of the weights; repeatable. Default: auto."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times that everything runs; figures are medians.")] = 5,
    json: JsonOption = None,
) -> None:
    """Measure plain and speculative decoding, ours and that of transformers, on the same weights."""
    check_json(json)
    _check_numbers(num_prompts=num_prompts, max_new_tokens=max_new_tokens, rounds=rounds, gamma=gamma)
    _check_prompts(prompts, data)
    from models.bench.report import make_notes, make_rows
    from models.bench.run import run_cells
    from models.decode.sampling import SamplingParams
    from train.commands.contenders import choose_cells, open_prompts, open_targets

    laws = [SamplingParams(temperature=value) for value in dict.fromkeys(temperature or [0.0])]
    console = make_console(stderr=True)
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="nestling-bench-") as scratch:
        with console.status("preparing"):
            targets = open_targets(model, dtype or ["auto"], Path(scratch))
            prompt_ids = open_prompts(targets[0].folder, prompts, data, num_prompts, max_new_tokens)
            cells, notes = choose_cells(targets, laws, draft or ["auto"], gamma)
        with _progress_bar(console, len(cells) * (1 + rounds * len(prompt_ids))) as advance:
            runs = run_cells(
                cells, prompt_ids, max_new_tokens=max_new_tokens, num_rounds=rounds, progress=advance
            )
    rows = make_rows(runs)
    notes += make_notes(rows, runs, num_prompts=len(prompt_ids))
    settings = {
        "model": str(model),
        "prompts": str(prompts or data or "headings"),
        "num_prompts": len(prompt_ids),
        "num_prompt_tokens": sum(map(len, prompt_ids)),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "busy_rounds": sum(runs.busy),
        "threads": {target.dtype: target.num_threads for target in targets},
    }
    _add_utilisation(rows, targets[0], settings)
    _finish(make_console(), json, {"results": rows, **settings, "notes": notes})


def _check_numbers(*, num_prompts: int, max_new_tokens: int, rounds: int, gamma: int | None) -> None:
    for flag, value, least in (
        ("--num-prompts", num_prompts, 1),
        ("--max-new-tokens", max_new_tokens, 2),  # decoding alone begins with the second
        ("--rounds", rounds, 1),
        ("--gamma", gamma, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} must be at least {least}, got {value}")


def _check_prompts(prompts: Path | None, data: str | None) -> None:
    if prompts and data:
        raise UsageError(f"--prompts {prompts} and --data {data} exclude each other; give one of them")
    if prompts:
        check_file("--prompts", prompts)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep off the screen what it warns of: its own use of its own settings."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(before)


@contextlib.contextmanager
def _progress_bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("decoding", total=total)
        yield lambda: bar.advance(task)


def _add_utilisation(rows: "Sequence[Row]", target: "Target", settings: Mapping[str, Any]) -> None:
    from models.bench.report import add_utilisation
    from models.machine import machine_card

    card = machine_card()
    if not card.busy:  # a bandwidth that others shared is no yardstick
        mean_prompt = settings["num_prompt_tokens"] / settings["num_prompts"]
        add_utilisation(
            rows,
            target.model.config,
            num_positions=mean_prompt + settings["max_new_tokens"] / 2,
            read_gbps=card.device.read_gbps,
        )


def _finish(console: Console, path: Path | None, results: Mapping[str, Any]) -> None:
    """A card, a table, notes, and one last line of JSON: the object that --json writes."""
    import json

    from models.bench.report import describe, facts
    from models.card import make_card
    from models.files import write_json

    card = make_card(dtypes={"model": " and ".join(results["threads"])})
    overview = Table(show_header=False, box=None)
    for name, fact in facts(results, card):
        overview.add_row(name, fact)
    header, *rows = describe(results["results"], num_prompts=results["num_prompts"])
    table = Table(caption=_LEGEND, caption_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < 3 else "right", no_wrap=True)
    for texts in rows:
        table.add_row(*texts)
    console.print(overview)
    console.print(table)
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False)
    document = {**results, "card": card}
    if path is not None:
        write_json(path, document)
    print(json.dumps(document, ensure_ascii=False))


_LEGEND = (
    "tokens/s: prefill included, median over rounds and its range; decode only: after the first target pass; "
    "x plain: against nestling plain\ngamma: drafted tokens a round, or the schedule of transformers; "
    "tau: tokens per target pass; same ids: prompts whose greedy tokens are those of nestling plain"
)
