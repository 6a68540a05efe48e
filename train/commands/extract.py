"""`nestling extract`: cut one member out of a family, as a stock Hugging Face folder, and prove it."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from train.commands.common import JsonOption, ModelArgument, check_json, write_results
from train.console import make_console


def extract(
    model: ModelArgument,
    *,
    granularity: Annotated[
        str,
        typer.Option(metavar="G", help="A member's name, or written out: ffn=0.25,heads=0.5,layers=0:3:5."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")],
    json: JsonOption = None,
) -> None:
    """Cut one member out as a stock Hugging Face folder, and prove it equal."""
    check_json(json)
    from models.checkpoint import load_model
    from models.granularity import Granularity
    from train.extraction import extract_and_prove

    folder = load_model(model)
    member = Granularity.parse(granularity, folder.family)
    parity = extract_and_prove(folder, member, out, make_console())
    results = {"granularity": str(member), "out": str(out), **dataclasses.asdict(parity)}
    write_results(json, results, dtypes={"comparison": "fp32"})
