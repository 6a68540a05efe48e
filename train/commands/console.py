"""What the terminal shows: a console that also reads well in a file, and the family's table."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.checkpoint.family import Member

# Wide enough for every table: in a file or a pipe nothing is cut off.
WIDTH_OF_A_FILE = 160


def make_console(*, stderr: bool = False) -> Console:
    """A rich console; without a terminal, or with NO_COLOR, its output is plain text."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDTH_OF_A_FILE, highlight=False)


@contextlib.contextmanager
def progress_bar(console: Console, label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that the yielded function moves on by one; shown on a terminal only."""
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)


def family_table(members: Iterable[Member], *, title: str | None = None) -> Table:
    """One row for each member: its size, how well it models text and how close it is to the full model."""
    table = Table(title=title, title_justify="left", caption=_LEGEND, caption_justify="left")
    table.add_column("member", style="bold", no_wrap=True)
    table.add_column("granularity")
    for column in ("parameters", "loss", "perplexity", "match", "KL", "alpha"):
        table.add_column(column, justify="right", no_wrap=True)
    for member in members:
        table.add_row(
            member.name,
            "" if member.granularity == member.name else member.granularity,
            f"{member.parameters:,}",
            *(
                _number(value, form)
                for value, form in (
                    (member.loss, "{:.3f}"),
                    (member.perplexity, "{:.2f}"),
                    (member.match, "{:.1f}%"),
                    (member.kl, "{:.3f}"),
                    (member.alpha, "{:.3f}"),
                )
            ),
        )
    return table


_LEGEND = (
    "loss: nats per token. Against the full model: match (equal greedy\n"
    "tokens), KL (nats), alpha (chance that a token it drafts is kept)"
)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
