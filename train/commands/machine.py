"""`nestling machine`: what this machine does well, measured once; see models/machine/card.py."""

import dataclasses
from typing import Annotated

import typer

from train.commands.common import JsonOption, check_json, write_results
from train.commands.console import make_console


def machine(
    *,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    json: JsonOption = None,
) -> None:
    """Show what this machine does well: bandwidth, products, threads and the dtypes that pay."""
    check_json(json)
    from rich.table import Table

    from models.machine.card import decoding_dtype, describe, facts, machine_card, training_dtype

    console = make_console()
    with console.status("measuring this machine"):
        card = machine_card(refresh)
    overview = Table(show_header=False, box=None)
    for row in facts(card):
        overview.add_row(*row)
    header, *measured = describe(card)
    rates = Table(caption="v(m): the time of a pass on m tokens, in passes on one", caption_justify="left")
    for column in header:
        rates.add_column(column, justify="right")
    for texts in measured:
        rates.add_row(*texts)
    console.print(overview)
    console.print(rates)
    dtypes = {"training": training_dtype(card), "decoding": decoding_dtype(card)}
    write_results(json, {"machine": dataclasses.asdict(card)}, dtypes=dtypes)
