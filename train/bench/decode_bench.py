"""`nestling bench MODEL`: decoding, ours and that of other engines, in one run and one table."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from models.base.processor import peak_memory_bytes
from models.base.progress import progress_bar
from models.base.table import facts_table
from models.bench.report import LEGEND, Row, add_utilisation, facts, make_notes, make_rows, speed_table
from models.bench.run import run_cells
from models.machine.card import machine_card
from train.bench.contenders import BenchSettings, Contest, folder_contest, random_contest

DEFAULT_ALPHA = 0.8
"""Acceptance of the draft of a random model."""


def bench_decoding(
    settings: BenchSettings,
    *,
    model: Path | None,
    random: str | None,
    alpha: float | None,
    prompts: Path | None,
    data: str | None,
    rounds: int,
    console: Console,
) -> dict[str, Any]:
    """Measure decoding, and return the fields of docs/json.md but the card.

    Args:
        settings: settings of the comparison.
        model: a model folder; None for random weights.
        random: the size of a random model.
        alpha: the acceptance of its draft; None is `DEFAULT_ALPHA`.
        prompts: a file with prompts.
        data: or a text whose beginnings are the prompts.
        rounds: number of rounds.
        console: shows the progress.
    """
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="nestling-bench-") as scratch:
        settings = replace(settings, scratch=Path(scratch))
        with console.status("preparing"):
            if random:
                contest = random_contest(random, DEFAULT_ALPHA if alpha is None else alpha, settings)
            else:
                assert model is not None
                contest = folder_contest(model, settings, prompts=prompts, data=data)
        return _run(contest, settings.max_new_tokens, rounds, console)


def show_decoding(results: Mapping[str, Any], console: Console) -> None:
    """Print a card, a table and notes."""
    table = speed_table(results["results"], num_prompts=results["num_prompts"])
    console.print(facts_table(facts(results, results["card"])).to_rich())
    console.print(table.to_rich(caption=LEGEND))
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False)


def _run(contest: Contest, max_new_tokens: int, rounds: int, console: Console) -> dict[str, Any]:
    cells, prompt_ids = contest.cells, contest.prompt_ids
    with progress_bar("decoding", len(cells) * (1 + rounds * len(prompt_ids)), console=console) as bar:
        runs = run_cells(
            cells, prompt_ids, max_new_tokens=max_new_tokens, num_rounds=rounds, progress=bar.advance
        )
    rows = make_rows(runs)
    num_prompt_tokens = sum(map(len, prompt_ids))
    _add_utilisation(rows, contest, num_prompt_tokens / len(prompt_ids) + max_new_tokens / 2)
    return {
        "results": rows,
        **contest.about,
        "num_prompts": len(prompt_ids),
        "num_prompt_tokens": num_prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "busy_rounds": sum(runs.busy),
        "threads": {target.dtype: target.num_threads for target in contest.targets},
        "peak_memory_bytes": peak_memory_bytes(),
        "notes": contest.notes + make_notes(rows, runs, num_prompts=len(prompt_ids)),
    }


def _add_utilisation(rows: Sequence[Row], contest: Contest, num_positions: float) -> None:
    card = machine_card()
    if not card.busy:  # a bandwidth that others shared is no yardstick
        config, read_gbps = contest.targets[0].model.config, card.device.read_gbps
        add_utilisation(rows, config, num_positions=num_positions, read_gbps=read_gbps)


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
