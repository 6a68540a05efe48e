"""Fewer threads while other programs run: a thread that waits for one which is not running loses its time."""

import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch

from models.base.processor import Load, usable_cores
from train.run.callbacks.step import StepCallback
from train.run.module import JointModule

SECONDS = 2.0
"""Time between two looks at the load."""


class Threads(StepCallback):
    """Leaves the cores to others that they use, and takes them back; what is computed has the same bits.

    Args:
        most: threads on a quiet machine; None is what torch has now.
        load: reads the load; tests have their own.
    """

    def __init__(self, most: int | None = None, load: Callable[[], Load] = Load.now) -> None:
        super().__init__(every=1)
        self.most = torch.get_num_threads() if most is None else most
        self._load, self._last, self._looked = load, load(), time.monotonic()

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Look, if it is time."""
        if self.most > 1 and time.monotonic() - self._looked >= SECONDS:
            self.look()

    def look(self) -> None:
        """Set the threads by what others took since the last look."""
        now = self._load()
        torch.set_num_threads(threads_beside(now.others_since(self._last), self.most))
        self._last, self._looked = now, time.monotonic()


def threads_beside(fraction: float, most: int, cores: int | None = None) -> int:
    """Return how many threads find a core for themselves.

    Args:
        fraction: of the time of all cores, that others took.
        most: threads, if nobody else ran.
        cores: of the machine; None is what this process may use.

    >>> [threads_beside(fraction, 2, 2) for fraction in (0.0, 0.2, 0.3, 0.5, 1.0)]
    [2, 2, 1, 1, 1]
    """
    cores = usable_cores() if cores is None else cores
    return max(1, min(most, round(cores * (1 - fraction))))
