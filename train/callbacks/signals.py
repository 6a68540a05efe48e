"""SIGTERM, SIGINT, SIGUSR1 and the end of `trainer.max_time` finish the step and end the run.

                 set-up         training                         measuring, saving the model
first signal     exit at once   finish the step, save, exit      exit at once
second signal    exit at once, saving nothing

The exit code is 130 for SIGINT and 143 otherwise. What is written when an exit comes is whole or absent.
"""

import math
import multiprocessing
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch

from train.callbacks.step import StepCallback
from train.joint import JointModule

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals(StepCallback):
    """Handles the signals inside its `with` block; during training they are remembered.

    A signal to one process stops all of them after the same step.

    Args:
        max_seconds: after which training ends, counted from here.
    """

    def __init__(self, *, max_seconds: float = math.inf) -> None:
        super().__init__(every=1)
        self.deadline = time.monotonic() + max_seconds
        self.exit_code: int | None = None
        self._training = self._signalled = False
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the handlers back from Lightning, whose own would drop the work since the last state."""
        for number in SIGNALS:
            signal.signal(number, self._receive)
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        self._training = True

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Stop at the end of a step, never between its micro-batches."""
        if self.exit_code is None and time.monotonic() >= self.deadline:
            self.exit_code = 143
        if self._group is not None:
            # through the processors: asking an accelerator would make every step wait for it
            code = torch.tensor(self.exit_code or 0)
            torch.distributed.all_reduce(code, torch.distributed.ReduceOp.MAX, group=self._group)
            self.exit_code = int(code) or None
        if self.exit_code is not None:
            trainer.should_stop = True

    def training_ended(self) -> None:
        """From here on a signal ends the run at once.

        Raises:
            SystemExit: if one came before.
        """
        self._training = False
        if self.exit_code is not None:
            raise SystemExit(self.exit_code)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        code = 130 if number == signal.SIGINT else 143
        if self._signalled:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(code)
        self._signalled = True
        self.exit_code = code
        if not self._training:
            raise SystemExit(code)
