"""`nestling demo`: the whole chain in a few minutes; see train/commands/demo_run.py."""

from pathlib import Path
from typing import Annotated

import typer

from train.commands.common import JsonOption, check_json, write_results
from train.commands.console import make_console


def demo(
    context: typer.Context,
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run folder to write.")] = Path("checkpoints/demo"),
    json: JsonOption = None,
) -> None:
    """Train a family on Python's own source, cut a member out, decode with its own draft."""
    check_json(json)
    from train.commands.demo_run import run_demo

    results = run_demo(out, make_console(), overrides=context.args)
    write_results(json, results, dtypes={"decoding": results["decoding"]["dtype"]})
