"""`metrics.jsonl`: append-only, one JSON object a line, the source of truth; loggers mirror it.

{"kind": "train", "step": 10, "tokens": 40960, "loss/XL": 3.1, "loss/S": 0.8, "lr": 0.001, ...}
{"kind": "valid", "step": 50, "tokens": 204800, "valid/XL/loss": 2.9, "valid/S/alpha": 0.71, ...}
{"kind": "sample", "step": 50, "member": "S", "prompt": "...", "text": "..."}
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from torch import Tensor

from train.joint import JointModule
from train.objective import Batch


class MetricsLog:
    """Appends lines, and passes numbers on to loggers, whose failures are no one's loss.

    Args:
        path: of the file.
        mirrors: Lightning loggers (wandb, TensorBoard, ...).
        first_step: lines beyond this step belong to a history that a resumed run replaces.
    """

    def __init__(self, path: Path, mirrors: Sequence[Logger] = (), *, first_step: int = 0) -> None:
        self.path = path
        self.mirrors = list(mirrors)
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers go to the mirrors under the line's step as well."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if numbers:
            self._mirror(lambda logger: logger.log_metrics(numbers, step=step))

    def close(self) -> None:
        """Let the mirrors finish."""
        self._mirror(lambda logger: logger.finalize("success"))

    def _mirror(self, tell: Callable[[Logger], None]) -> None:
        for logger in list(self.mirrors):
            try:
                tell(logger)
            except Exception as error:  # noqa: BLE001 - a mirror may fail in any way, once
                self.mirrors.remove(logger)
                warnings.warn(f"{type(logger).__name__} failed and is dropped: {error}", stacklevel=3)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file; a line torn by a kill is dropped."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class Metrics(pl.Callback):
    """Writes a `train` line every `log_every_n_steps` steps.

    The losses are read once per line, so that the steps between run without waiting for the device.
    """

    def __init__(self, log: MetricsLog, *, tokens: int, every: int) -> None:
        self.lines = log
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
        """The time since the last batch and all that followed it went into waiting for data."""
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
        if (batch_idx + 1) % trainer.accumulate_grad_batches or pl_module.step % self.every:
            return
        elapsed = self._training + self._waiting
        line = {
            "tokens": self.tokens,
            "seconds": now - self._started,
            "lr": self._lr,
            "gradient_norm": _number(pl_module.gradient_norm),
            "tokens_per_second": self._window_tokens / elapsed,
            "data_wait": self._waiting / elapsed,
            **{f"loss/{name}": _number(loss) for name, loss in pl_module.losses.items()},
        }
        self._window_tokens, self._training, self._waiting = 0, 0.0, 0.0
        self.latest = line
        if trainer.is_global_zero:
            self.lines.write("train", pl_module.step, line)


def _number(value: Tensor | float) -> float:
    return float(value)  # a sync, once a line
