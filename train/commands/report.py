"""`nestling report`: one self-contained page about one run, or a comparison of several."""

from pathlib import Path
from typing import Annotated

import typer

from train.commands.console import make_console


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File to write. Default: report.html in or beside the runs."),
    ] = None,
) -> None:
    """Write one HTML page about a run, or a comparison of several."""
    from train.report.page import write_report

    place = runs[0] if len(runs) == 1 else runs[0].parent
    page = write_report(runs, out or place / "report.html")
    make_console().print(str(page), markup=False)
