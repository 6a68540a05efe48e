"""Writes what a step cost and reached to `metrics.jsonl`; see train/run/metrics.py."""

import time
from typing import Any

import lightning.pytorch as pl
import torch

from train.data.batch import Batch
from train.run.metrics import MetricsLog
from train.run.module import JointModule
from train.run.skip_steps import Guard


class Metrics(pl.Callback):
    """Writes a `train` line every `log_every_n_steps` steps, and one at the end of the run.

    The losses are read once per line, so that the steps between run without waiting for the device.

    Args:
        log: takes the lines.
        tokens: trained on before, when a run is resumed.
        every: optimizer steps between lines.
        full_speed: tokens per second of one device that did nothing but the step's products, at the rate
            that was measured for a large one; None if it was not measured.
    """

    def __init__(self, log: MetricsLog, *, tokens: int, every: int, full_speed: float | None = None) -> None:
        self.lines = log
        self.full_speed = full_speed
        self.tokens = tokens
        self.every = every
        self.latest: dict[str, float] = {}
        self._lr = self._training = self._waiting = 0.0
        self._window_tokens = 0
        self._started = self._batch_start = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock once set-up is over."""
        self._started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Count the time since the last batch and all that followed it as waiting for data."""
        assert isinstance(pl_module, JointModule)
        self._batch_start = time.perf_counter()
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self._waiting += self._batch_start - (pl_module.batch_ended or self._batch_start)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count tokens; at the end of every n-th step write a line."""
        assert isinstance(pl_module, JointModule)
        now = time.perf_counter()
        self._training += now - self._batch_start
        num_tokens = batch.tokens_BT.numel() * trainer.world_size
        self.tokens += num_tokens
        self._window_tokens += num_tokens
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if pl_module.step % self.every and pl_module.step != pl_module.recipe.trainer.max_steps:
            return
        elapsed = self._training + self._waiting
        # Each process has those of its rows; where the full model only teaches there may be none.
        names, parts = list(pl_module.losses), list(pl_module.losses.values())
        sums = trainer.strategy.reduce(torch.stack(parts), reduce_op="sum") if parts else torch.zeros(0)
        speed = self._window_tokens / elapsed
        line = {
            "tokens": self.tokens,
            "seconds": now - self._started,
            "lr": self._lr,
            "gradient_norm": float(pl_module.gradient_norm),
            "tokens_per_second": speed,
            **({"mfu": speed / (self.full_speed * trainer.world_size)} if self.full_speed else {}),
            "data_wait": self._waiting / elapsed,
            **_counts(pl_module.guard),
            **{f"loss/{name}": loss for name, loss in zip(names, sums.tolist(), strict=True)},  # a sync
        }
        self._window_tokens, self._training, self._waiting = 0, 0.0, 0.0
        self.latest = line
        self.lines.write("train", pl_module.step, line)


def _counts(guard: Guard) -> dict[str, int]:
    return {"skipped": guard.skipped, "rollbacks": guard.rollbacks} if guard.sigma else {}
