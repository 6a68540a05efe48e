"""The progress bar of all long work: on a terminal, and nothing anywhere else."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


@dataclass
class Bar:
    """Work that goes on; `advance` and `show` move the bar."""

    progress: "Progress"
    label: str
    total: float | None
    unit: str = ""
    done: float = 0.0
    task: "TaskID" = field(init=False)

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


@contextlib.contextmanager
def progress_bar(
    label: str, total: float | None = None, *, console: "Console | None", unit: str = ""
) -> Iterator[Bar]:
    """Show how far work has come; the bar pulses where the total is not known.

    Args:
        label: names the work.
        total: amount of work.
        console: shows the bar; nothing does without one, or on one that is no terminal.
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
        yield Bar(progress, label, total, unit)
