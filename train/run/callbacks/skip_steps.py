"""Ends a run that went astray, so that its caller can go back; see train/run/skip_steps.py."""

import lightning.pytorch as pl

from train.run.callbacks.step import StepCallback
from train.run.module import JointModule


class Stability(StepCallback):
    """Looks every n steps whether three in a row were skipped; looking waits for the device."""

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Stop the steps that would be thrown away."""
        if module.guard.diverged:
            trainer.should_stop = True
