"""A table of text cells that a terminal, Markdown and HTML show alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from models.base.numbers import NOTHING

if TYPE_CHECKING:
    import rich.table

Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Field of a row -> the column's name, and how its values are written."""


@dataclass(frozen=True)
class Table:
    """Text cells; the first `num_labels` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], columns: Columns, *, labels: Sequence[str]) -> "Table":
        """Make a table of records; a column that no record fills is left out.

        Args:
            rows: the records; a field that is missing or None is shown as a dash.
            columns: the fields to show, in order.
            labels: those whose columns are words; they come first.

        >>> columns = {"name": ("member", str), "loss": ("loss", str), "kl": ("KL", str)}
        >>> Table.of([{"name": "S", "loss": 2.01}], columns, labels=["name"])
        Table(header=('member', 'loss'), rows=(('S', '2.01'),), num_labels=1)
        """
        filled = {name for row in rows for name, value in row.items() if value is not None}
        used = {name: column for name, column in columns.items() if name in filled}
        cells = (
            tuple(NOTHING if row.get(name) is None else form(row[name]) for name, (_, form) in used.items())
            for row in rows
        )
        header = tuple(title for title, _ in used.values())
        return Table(header, tuple(cells), sum(name in labels for name in used))

    def to_rich(self, *, title: str | None = None, caption: str | None = None) -> "rich.table.Table":
        """Return the table for a terminal; one without a header is a list of names and values."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape as plain
        from rich.table import Table as RichTable

        table = RichTable(
            title=title,
            title_justify="left",
            caption=caption,
            caption_justify="left",
            box=SIMPLE_HEAD if any(self.header) else None,
            show_header=any(self.header),
            padding=(0, 1, 0, 0),
        )
        for place, name in enumerate(self.header):
            is_label = place < self.num_labels
            table.add_column(
                name, justify="left" if is_label else "right", no_wrap=not is_label or place == 0
            )
        for row in self.rows:
            table.add_row(*map(plain, row))
        return table

    def to_markdown(self) -> str:
        """Return the table in Markdown, numbers to the right.

        >>> print(Table(("member", "loss"), (("S", "2.010"), ("XL", "1.770"))).to_markdown())
        | member | loss |
        |---|---:|
        | S | 2.010 |
        | XL | 1.770 |
        """
        rule = ["---" if place < self.num_labels else "---:" for place in range(len(self.header))]
        rows = [self.header, *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])

    def to_html(self, *, emphasis: str | None = None) -> str:
        """Return the table in HTML; the row that starts with `emphasis` is bold. No rows give no text."""
        if not self.rows:
            return ""
        head = "".join(self._cells("th", self.header))
        body = ""
        for row in self.rows:
            opening = '<tr class="strong">' if row[0] == emphasis else "<tr>"
            body += f"{opening}{''.join(self._cells('td', row))}</tr>"
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _cells(self, tag: str, row: Sequence[str]) -> list[str]:
        kinds = ["label" if place < self.num_labels else "number" for place in range(len(row))]
        return [
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>' for kind, cell in zip(kinds, row, strict=True)
        ]


def facts_table(facts: Sequence[tuple[str, str]]) -> Table:
    """Return names and values as a table without a header."""
    return Table(("", ""), tuple(facts), num_labels=2)
