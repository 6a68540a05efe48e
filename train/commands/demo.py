"""`nestling demo`: the whole chain in a few minutes; see demo_run.py, and demo_pretrained.py for a model."""

from pathlib import Path
from typing import Annotated

import typer

from train.commands.common import check_json, write_results
from train.commands.console import make_console
from train.commands.options import JsonOption


def demo(
    context: typer.Context,
    *,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder to write.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Model folder or GGUF file to train a draft for, in place of training a family."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Train a family on Python's own source, cut a member out, decode with its own draft."""
    check_json(json)
    if model is None:
        from train.commands.demo_run import run_demo

        results = run_demo(out or Path("checkpoints/demo"), make_console(), overrides=context.args)
    else:
        from train.commands.demo_pretrained import run_demo_pretrained

        out = out or Path("checkpoints/demo-pretrained")
        results = run_demo_pretrained(model, out, make_console(), overrides=context.args)
    write_results(json, results, dtypes={"decoding": results["decoding"]["dtype"]})
