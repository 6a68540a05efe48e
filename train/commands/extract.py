"""`nestling extract`: cut one member out of a family, as a stock Hugging Face folder, and prove it."""

from pathlib import Path
from typing import Annotated

import typer

from models.errors import NestlingError
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
    from models.count import count_parameters
    from models.extract import extract as cut_out
    from models.extract import verify_extraction
    from models.granularity import Granularity

    folder = load_model(model)
    member = Granularity.parse(granularity, folder.family)
    cut_out(folder, member, out)
    parity = verify_extraction(folder, member, out)
    if not parity.holds:
        raise NestlingError(
            f"{out} differs from the member in place (greedy ids equal: {parity.ids_equal}, logits "
            f"differ by {parity.difference:.1e} of the largest); do not use it, and please report this"
        )
    parameters = count_parameters(folder.model.config, member)
    make_console().print(
        f"{out}: {parameters:,} of {count_parameters(folder.model.config):,} parameters ({member})\n"
        f"equal in stock transformers: greedy ids of {parity.num_tokens} positions identical, "
        f"logits within {parity.difference:.0e} of the largest",
        markup=False,
    )
    write_results(
        json,
        {
            "granularity": str(member),
            "out": str(out),
            "parameters": parameters,
            "num_tokens": parity.num_tokens,
            "ids_equal": parity.ids_equal,
            "difference": parity.difference,
        },
        dtypes={"comparison": "fp32"},
    )
