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

from train.callbacks.step import StepCallback
from train.joint import JointModule

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals(StepCallback):
    """Handles the signals inside its `with` block; during training they are remembered.

    Args:
        max_seconds: after which training ends, counted from here.
        every: steps after which several processes agree to end; a single one looks at each step.
    """

    def __init__(self, *, max_seconds: float = math.inf, every: int = 1) -> None:
        super().__init__(every=1)
        self.agree_every = every
        self.deadline = time.monotonic() + max_seconds
        self.exit_code: int | None = None
        self._training = self._signalled = False
        self._previous: dict[int, Any] = {}

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
        self._training = True

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Stop at the end of a step, never between its micro-batches."""
        if self.exit_code is None and time.monotonic() >= self.deadline:
            self.exit_code = 143
        if trainer.world_size > 1:
            if module.step % self.agree_every:
                return
            # waits for the other processes: all must stop after the same step
            if trainer.strategy.reduce_boolean_decision(self.exit_code is not None, all=False):
                self.exit_code = self.exit_code or 143
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
