"""`nestling report`: one self-contained page about one run, or a comparison of several."""

import os
from pathlib import Path
from typing import Annotated

import typer

from models.base.outputs import check_apart, check_link
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
    place = runs[0] if len(runs) == 1 else runs[0].parent
    out = out or place / "report.html"
    check_link("--out", out)
    if Path(os.path.realpath(out)).suffix != ".html":  # a page may lie in the run's folder
        check_apart({"--out": out}, {"RUN": runs})
    from train.report.page import write_report

    page = write_report(runs, out)
    make_console().print(str(page), markup=False)
