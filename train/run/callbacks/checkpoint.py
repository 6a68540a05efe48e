"""Writes resumable states every n steps, first and last, and puts the optimizer's state back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from train.run.callbacks.metrics import Metrics
from train.run.callbacks.step import StepCallback
from train.run.module import JointModule
from train.run.state import TrainingState, save_state


class Checkpoint(StepCallback):
    """Keeps `steps/<n>/` of a run folder.

    The state of step 0 is what a run goes back to that goes astray early on, and it tells at once
    whether the disk takes such a state.

    Args:
        steps: the folder of states.
        metrics: knows how many tokens were trained on.
        every: optimizer steps between states.
        keep: number of states to keep.
        row_at: the next row that the run reads after a step.
        run: the run that the states are of.
        state: the one that the run goes on from, if any.
    """

    def __init__(
        self,
        steps: Path,
        metrics: Metrics,
        *,
        every: int,
        keep: int,
        row_at: Callable[[int], int],
        run: Mapping[str, Any],
        state: TrainingState | None = None,
    ) -> None:
        super().__init__(every=every)
        self.steps, self.metrics, self.keep, self.state = steps, metrics, keep, state
        self.row_at, self.run = row_at, run
        self._saved = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the optimizer's moments; the weights were restored before."""
        assert isinstance(pl_module, JointModule)
        if self.state is not None:
            self.state.restore_optimizer(pl_module.model, trainer.optimizers[0])
        else:
            self.on_step(trainer, pl_module)

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Save this step's state, once; never one that the run is about to leave."""
        if module.step == self._saved or module.guard.diverged:
            return
        self._saved = module.step
        if module.written is not None:
            module.written.drop_until(module.step)
        self.metrics.lines.sync()  # a state on disk tells that the lines before it are there, too
        save_state(
            self.steps,
            module.model,
            trainer.optimizers[0],
            step=module.step,
            tokens=self.metrics.tokens,
            keep=self.keep,
            rows=self.row_at(module.step),
            guard=module.guard.counters(),
            run=self.run,
            replay=module.written.replay if module.written is not None else None,
            writes=trainer.is_global_zero,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where the run ends or is stopped."""
        assert isinstance(pl_module, JointModule)
        self.on_step(trainer, pl_module)
