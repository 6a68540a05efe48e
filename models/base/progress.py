"""The progress of all long work: a bar on a terminal, and elsewhere a line each half a minute."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from models.base.numbers import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SILENT_SECONDS = 30.0
"""The longest time without a line where there is no bar."""


@dataclass
class Bar:
    """Work that goes on; `advance` and `show` move the bar."""

    progress: "Progress"
    label: str
    total: float | None
    unit: str = ""
    lines: "Console | None" = None
    done: float = 0.0
    task: "TaskID" = field(init=False)
    began: float = field(init=False, default_factory=perf_counter)
    printed: float = field(init=False, default_factory=perf_counter)

    def __post_init__(self) -> None:
        self.task = self.progress.add_task(self.label, total=self.total, amount="")

    def advance(self, amount: float = 1) -> None:
        """Say that this much more was done."""
        self.show(self.label, self.done + amount, self.total)

    def show(self, label: str, done: float, total: float | None) -> None:
        """Say what is being done, how much of it is done, and of how much."""
        self.label, self.done, self.total = label, done, total
        whole = "" if total is None or self.unit else f"/{total:g}"
        amount = f"{done:,.1f}{self.unit}" if self.unit else f"{done:g}{whole}"
        self.progress.update(self.task, description=label, completed=done, total=total, amount=amount)
        if self.lines is not None and perf_counter() - self.printed > SILENT_SECONDS:
            self._print(amount)

    def _print(self, amount: str) -> None:
        """Print a line in place of the bar."""
        assert self.lines is not None
        self.printed = perf_counter()
        left = ""
        if self.total and self.done:
            left = f", about {duration((self.printed - self.began) * (self.total / self.done - 1))} left"
        self.lines.print(f"{self.label}: {amount}{left}", markup=False, highlight=False)


@contextlib.contextmanager
def progress_bar(
    label: str, total: float | None = None, *, console: "Console | None", unit: str = ""
) -> Iterator[Bar]:
    """Show how far work has come; the bar pulses where the total is not known.

    Args:
        label: names the work.
        total: amount of work.
        console: shows the bar, or lines where it is no terminal; nothing does without one.
        unit: follows the amount.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console is not None and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        yield Bar(progress, label, total, unit, None if shown else console)
