"""The loader without state: a batch is a function of (seed, step), so a run can go on anywhere.

    rows of epoch 0, shuffled │ rows of epoch 1, shuffled │ ...
    ├── step 0 ──┼── step 1 ──┼── step 2 ──┼── step 3 ──┤        num_rows each, across epochs
    ├ m0 ┼ m1 ┼ m2 ┤                                             micro-batches of a step
    │r0 r1 r0 r1                                                 ranks take its rows in turn

Every row comes once an epoch. The rows of a step do not depend on the number of processes, and the number
of labels, the one divisor of the loss, is counted over all of them without communication. Ranks take
rows in turn because members train on neighbouring rows of a step (train/objective/sampler.py): so each rank
has an equal part of that work.
"""

import functools
import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.data.batch import Batch
from train.data.pack import Rows

SAMPLE_BATCH_TOKENS = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class StepLoader:
    """Iterates over the micro-batches of steps `start_step` to `num_steps`, as one rank sees them.

    It has no length on purpose: Lightning compares one with counters of its own, which know nothing
    of `start_step`.

    Args:
        rows: rows to train on, at least one.
        batch_size: rows of a micro-batch, over all ranks; the ranks divide it evenly.
        accumulate: micro-batches of a step.
        seed: seed of the shuffles.
        num_steps: last step of the run, counted from the run's very beginning.
        start_step: steps that are done already.
        first_row: the place of the first row of `start_step`, counted over all epochs; None: as if all steps
            before it had been of this size. So a run may go on with other sizes, and one that went back
            does not read again the rows on which it diverged.
        rank: this process.
        world_size: number of processes.
        num_workers: processes that read ahead; any number gives the same batches.
        repeat: False stops after one epoch, whose last step is filled with rows without labels.
    """

    rows: Rows
    batch_size: int
    accumulate: int = 1
    seed: int
    num_steps: int
    start_step: int = 0
    first_row: int | None = None
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    repeat: bool = True

    def __post_init__(self) -> None:
        assert len(self.rows) > 0
        assert 0 <= self.rank < self.world_size
        assert self.batch_size % self.world_size == 0, (self.batch_size, self.world_size)

    @property
    def rows_per_step(self) -> int:
        """Rows of one step, over all micro-batches and ranks."""
        return self.batch_size * self.accumulate

    def batch(self, step: int, micro: int) -> Batch:
        """Return this rank's part of a micro-batch: a pure function of its arguments."""
        first_row = micro * self.batch_size + self.rank
        ids_of_step = self.row_ids(step)
        ids_here = ids_of_step[first_row : (micro + 1) * self.batch_size : self.world_size]
        tokens_BT, labels_BT = self.rows.gather(ids_here)
        return Batch(
            tokens_BT=tokens_BT,
            labels_BT=labels_BT,
            step=step,
            first_row=first_row,
            num_rows=self.rows_per_step,
            num_valid=max(1, self.rows.count_labels(ids_of_step)),  # a step may hold questions alone
            stride=self.world_size,
            row_ids_B=torch.from_numpy(ids_here.copy()),
        )

    def row_ids(self, step: int) -> NDArray[np.int64]:
        """Return the rows of a step, over all micro-batches and ranks."""
        first = self.start_step * self.rows_per_step if self.first_row is None else self.first_row
        indices = first + (step - self.start_step) * self.rows_per_step + np.arange(self.rows_per_step)
        epochs, offsets = np.divmod(indices, len(self.rows))
        ids = np.full(self.rows_per_step, len(self.rows))
        for epoch in np.unique(epochs) if self.repeat else [0]:
            order = epoch_order(self.seed, int(epoch), len(self.rows))
            ids[epochs == epoch] = order[offsets[epochs == epoch]]
        return ids

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.start_step * self.accumulate, self.num_steps * self.accumulate)
        if self.num_workers == 0:
            return (self.batch(*divmod(number, self.accumulate)) for number in numbers)
        return iter(
            DataLoader(
                _MicroBatches(self),
                batch_size=None,
                sampler=numbers,
                num_workers=self.num_workers,
                collate_fn=_unchanged,
                worker_init_fn=_leave_signals_to_the_parent,
                # its own generator: drawing the workers' seed would move the global random state
                generator=torch.Generator(),
            )
        )


def one_pass(rows: Rows, *, batch_size: int, rank: int = 0, world_size: int = 1) -> StepLoader:
    """Load every row once, in a fixed shuffled order, so that the first few batches are a fair sample."""
    return StepLoader(
        rows=rows,
        batch_size=batch_size,
        seed=0,
        num_steps=-(-len(rows) // batch_size),
        rank=rank,
        world_size=world_size,
        repeat=False,
    )


def take_batches(rows: Rows, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and labels [B, T] of a fair sample of the rows."""
    num_rows = -(-num_tokens // rows.sequence_length)
    batch_size = max(1, min(num_rows, SAMPLE_BATCH_TOKENS // rows.sequence_length))
    num_batches = -(-num_rows // batch_size)
    for batch in itertools.islice(one_pass(rows, batch_size=batch_size), num_batches):
        yield batch.tokens_BT, batch.labels_BT


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """Return a shuffle of the rows.

    It sorts the raw output of a counter-based generator: NumPy keeps that stream forever, but not what
    `Generator.permutation` makes of it.

    >>> epoch_order(0, 0, 5), epoch_order(0, 1, 5)
    (array([...]), array([...]))
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False  # shared by every caller
    return order


class _MicroBatches(Dataset[Batch]):
    """The micro-batches of a run by number, for the workers."""

    def __init__(self, loader: StepLoader) -> None:
        self.loader = loader

    def __getitem__(self, number: int) -> Batch:
        return self.loader.batch(*divmod(number, self.loader.accumulate))


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ignore signals: one to every process of a job must not cost the step that the parent finishes."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch
