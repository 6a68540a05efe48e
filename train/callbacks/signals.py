"""SIGTERM, SIGINT and SIGUSR1 finish the step and end the run; a second one ends it at once."""

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from train.callbacks.step import StepCallback
from train.joint import JointModule

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals(StepCallback):
    """Remembers the signal; Lightning stops after the step, and the caller exits with its code.

    A signal to one process stops all of them after the same step.
    """

    def __init__(self) -> None:
        super().__init__(every=1)
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    @property
    def exit_code(self) -> int | None:
        """130 for SIGINT, 143 otherwise; None if no signal came."""
        if self.received is None:
            return None
        return 130 if self.received == signal.SIGINT else 143

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the handlers over; Lightning's own would drop the work since the last state."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Stop at the end of a step, never between its micro-batches."""
        if self._group is not None:
            # through the processors: asking an accelerator would make every step wait for it
            flag = torch.tensor(self.received or 0)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
            self.received = int(flag) or None
        if self.received is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(130 if number == signal.SIGINT else 143)
        self.received = number
