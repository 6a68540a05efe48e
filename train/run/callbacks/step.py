"""The base of callbacks that act at the end of every n-th optimizer step, never between micro-batches."""

from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl

from train.run.module import JointModule


class StepCallback(pl.Callback, ABC):
    """Calls `on_step` at the end of every n-th step.

    Args:
        every: optimizer steps between calls.
    """

    def __init__(self, *, every: int) -> None:
        self.every = every

    @abstractmethod
    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Act; `module.step` steps are done."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Call `on_step` after the last one of every n-th step."""
        assert isinstance(pl_module, JointModule)
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ends_step and pl_module.step % self.every == 0:
            self.on_step(trainer, pl_module)
