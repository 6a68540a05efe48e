"""Time all cells in one process, in turn.

For every round and every prompt all cells run once, each time beginning with another one: a machine
that slows down, warms up or is disturbed does so for all of them alike, and none always follows the
same idle moment. Figures are medians over rounds; their range shows how quiet the machine was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from models.base.processor import Load
from models.bench.contenders import Cell, Label
from models.bench.engines import Sample

Progress = Callable[[], None]


@dataclass
class Runs:
    """All that was timed."""

    samples: dict[Label, list[list[Sample]]]
    """Samples of each cell, by round, by prompt."""
    busy: list[bool] = field(default_factory=list)
    """True if other programs kept the machine busy, by round."""


def run_cells(
    cells: Sequence[Cell],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_rounds: int,
    progress: Progress | None = None,
) -> Runs:
    """Warm every cell up, then time all of them.

    Args:
        cells: the cells.
        prompts: token ids to continue; the seed of a prompt is its number, so that every round decodes
            the same tokens.
        max_new_tokens: length of each continuation.
        num_rounds: number of rounds.
        progress: called after each continuation, those that warm up included (one for each cell).
    """
    runs = Runs({cell.label: [[] for _ in range(num_rounds)] for cell in cells})
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        # The longest prompt in full: caches that are kept between calls take their final size.
        for cell in cells:
            _decode(cell, max(prompts, key=len), max_new_tokens, 0, progress)
        for number in range(num_rounds):
            before = Load.now()
            for seed, prompt_ids in enumerate(prompts):
                for cell in _rotated(cells, number * len(prompts) + seed):
                    sample = _decode(cell, prompt_ids, max_new_tokens, seed, progress)
                    runs.samples[cell.label][number].append(sample)
            runs.busy.append(before.is_busy(Load.now()))
    return runs


def _decode(
    cell: Cell, prompt_ids: Sequence[int], max_new_tokens: int, seed: int, progress: Progress | None
) -> Sample:
    if torch.get_num_threads() != cell.label.threads:
        torch.set_num_threads(cell.label.threads)
    sample = cell.engine.decode(prompt_ids, max_new_tokens=max_new_tokens, seed=seed)
    assert len(sample.ids) == max_new_tokens, (cell.label, len(sample.ids))
    if progress:
        progress()
    return sample


def _rotated(cells: Sequence[Cell], turn: int) -> Iterator[Cell]:
    first = turn % len(cells)
    yield from cells[first:]
    yield from cells[:first]
