"""A progress bar on a terminal; elsewhere lines: the first loss, the first after each tenth, one a minute."""

from time import perf_counter

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.base.numbers import duration
from train.recipe.recipe import FULL_NAME
from train.run.callbacks.metrics import Metrics
from train.run.callbacks.step import StepCallback
from train.run.module import JointModule

OWN_LOSS = f"loss/{FULL_NAME}"
SILENT_SECONDS = 60.0
"""The longest time without a line, in a file or a pipe."""


class ProgressBar(StepCallback):
    """Shows steps, the full model's loss, tokens per second and the time that remains.

    Args:
        console: shows the progress.
        metrics: read for the latest line.
        max_steps: steps of the run, resumed ones included.
    """

    def __init__(self, console: Console, metrics: Metrics, *, max_steps: int) -> None:
        super().__init__(every=1)
        self.console, self.metrics, self.max_steps = console, metrics, max_steps
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self.bar.add_task("training", total=max_steps, status="")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar; a resumed run starts where it left off."""
        assert isinstance(pl_module, JointModule)
        self.bar.update(self._task, completed=pl_module.first_step)
        self.bar.start()
        self._first = pl_module.first_step
        self._began = self._printed = perf_counter()
        self._tenth = -1
        self._losses: dict[str, float] = {}
        self._shown: dict[str, float] = {}

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Advance."""
        latest = self.metrics.latest
        losses = {key: value for key, value in latest.items() if key.startswith("loss/")}
        # The full model may train in some steps alone: then its last loss stays, not another member's.
        self._losses |= losses
        loss = self._losses.get(OWN_LOSS, next(iter(losses.values()), None))
        status = ""
        if loss is not None:
            status = f"loss {loss:.3f} · {latest['tokens_per_second']:,.0f} tokens/s"
        if latest.get("skipped"):
            status += f" · {latest['skipped']:.0f} skipped"
        self.bar.update(self._task, completed=module.step, status=status)
        if status and not self.console.is_terminal:
            self._print(module.step, status)

    def _print(self, step: int, status: str) -> None:
        """Print a line if one is due."""
        now, tenth, latest = perf_counter(), step * 10 // self.max_steps, self.metrics.latest
        has_news = tenth > self._tenth and latest is not self._shown
        if has_news or now - self._printed > SILENT_SECONDS:
            self._tenth, self._printed, self._shown = tenth, now, latest
            seconds = (now - self._began) / max(1, step - self._first) * (self.max_steps - step)
            left = f" · {duration(seconds)} left" if step < self.max_steps else ""
            self.console.print(f"step {step}/{self.max_steps} {status}{left}", highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the terminal as it was."""
        self.bar.stop()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        self.bar.stop()
