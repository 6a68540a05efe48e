"""SIGTERM, SIGINT, SIGUSR1 and the end of `trainer.max_time` finish the step and end the run.

                 set-up         training                         measuring, saving the model
first signal     exit at once   finish the step, save, exit      exit at once
second signal    exit at once, saving nothing

The exit code is 130 for SIGINT and 143 otherwise. What is written when an exit comes is complete or absent.
"""

import math
import multiprocessing
import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

import lightning.pytorch as pl
import torch

from train.run.callbacks.step import StepCallback
from train.run.module import JointModule

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
        self.exit_code: int | None = None  # what all processes agree on
        self._code: int | None = None  # what came to this one
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
        if self._code is None and time.monotonic() >= self.deadline:
            self._code = 143
        self._agree()
        if self.exit_code is not None:
            trainer.should_stop = True

    def training_ended(self) -> int | None:
        """End the training phase: from here on a signal ends its process at once.

        Returns:
            The exit code if one came before, to whichever process.
        """
        self._training = False
        self._agree()
        return self.exit_code

    def _agree(self) -> None:
        code = self._code  # what comes while this one waits for the others is for the next step
        if self._group is not None:
            # through the processors: asking an accelerator would make every step wait for it
            highest = torch.tensor(code or 0)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self._group)
            code = int(highest) or None
        self.exit_code = code

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        code = 130 if number == signal.SIGINT else 143
        if self._signalled:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(code)
        self._signalled = True
        self._code = code
        if not self._training:
            print("nestling: stopped; the same command starts again from what is saved", file=sys.stderr)
            raise SystemExit(code)
