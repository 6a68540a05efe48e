"""A progress bar for work whose length may not be known."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Count characters on a terminal; the bar pulses where the total is not known.

    Args:
        what: is being done.
        total: characters in all.
        console: where to; nothing is shown without one, or on one that is no terminal.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]:,.1f} MB"),
        TimeElapsedColumn(),
    )
    shown = console is not None and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(what, total=total, done=0.0)
        num_chars = 0

        def advance(chars: int) -> None:
            nonlocal num_chars
            num_chars += chars
            bar.update(task, completed=num_chars, done=num_chars / 1e6)

        yield advance
        bar.update(task, total=num_chars)
