"""One table for the terminal, Markdown and HTML."""

import io

import pytest
from rich.console import Console

from models.base.numbers import fixed
from models.base.progress import progress_bar
from models.base.table import Columns, Table, facts_table

COLUMNS: Columns = {"name": ("member", str), "loss": ("loss", fixed(2)), "kl": ("KL", fixed(3))}


def shown(table: Table) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table.to_rich(title="the family", caption="nats"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_column_that_no_record_fills_is_left_out() -> None:
    table = Table.of([{"name": "S", "loss": 2.0}, {"name": "XL", "kl": None}], COLUMNS, labels=["name"])
    assert table == Table(("member", "loss"), (("S", "2.00"), ("XL", "-")))


def test_cells_are_text_and_never_markup() -> None:
    table = Table(("a[b]", "c|<d>"), (("[red]x", "1|<2>"),))
    assert "[red]x" in shown(table)
    assert "1\\|<2>" in table.to_markdown()
    assert '<td class="number">1|&lt;2&gt;</td>' in table.to_html()


def test_the_terminal_shows_title_header_rows_and_caption() -> None:
    lines = [line.strip() for line in shown(Table(("member", "loss"), (("S", "2.00"),))).splitlines()]
    assert [lines[0], lines[2], lines[4], lines[-1]] == ["the family", "member  loss", "S       2.00", "nats"]
    assert "─" not in shown(facts_table([("name", "value")]))


def test_the_row_of_the_full_model_stands_out_in_html() -> None:
    html = Table(("member",), (("S",), ("XL",))).to_html(emphasis="XL")
    assert '<tr class="strong"><td class="label">XL</td></tr>' in html
    assert Table(("member",), ()).to_html() == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_only(is_terminal: bool) -> None:
    stream = io.StringIO()
    with progress_bar("decoding", 3, console=Console(file=stream, force_terminal=is_terminal)) as bar:
        bar.advance()
        bar.show("verifying", 2, 3)
    assert ("verifying" in stream.getvalue()) == is_terminal
    with progress_bar("reading", console=None, unit=" MB") as bar:
        bar.advance(1.5)
    assert bar.done == 1.5
