"""The help of `nestling train`: its flags and three dials; with `--help-all` every setting of a recipe."""

from collections.abc import Iterable
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from train.commands.console import make_console

HELP_ALL = "--help-all"


class TrainCommand(typer.core.TyperCommand):
    """A command that takes recipe keys, and explains them."""

    def format_help(self, *arguments: Any) -> None:
        """Print the flags, then the dials."""
        super().format_help(*arguments)
        from train.recipe.dials import DIALS

        rows = [(f"{name}=", dial.values, dial.default, dial.help) for name, dial in DIALS.items()]
        console = make_console()
        console.print(_table(("dial", "takes", "default", "what it does"), rows))
        console.print(f"\n{HELP_ALL} shows every setting, those that the dials set among them.", markup=False)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Show every setting and exit where `--help-all` is among the flags."""
        if HELP_ALL in args:
            print_settings()
            ctx.exit()
        return super().parse_args(ctx, args)


def print_settings() -> None:
    """Print key, values, default and help of every setting, a table for each section."""
    from train.recipe.recipe import Recipe, recipe_help

    console, default = make_console(), Recipe()
    sections: dict[str, list[tuple[str, ...]]] = {}
    for row in recipe_help():
        section = row.key.rpartition(".")[0]
        sections.setdefault(section, []).append((row.key, row.type, row.default, row.help))
    for section, rows in sections.items():
        text = str((getattr(default, section) if section else default).__doc__)
        console.print(f"\n{section or 'recipe'}: {text.splitlines()[0]}", style="bold", markup=False)
        console.print(_table(("recipe key", "takes", "default", "what it means"), rows))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
