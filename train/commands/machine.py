"""`nestling machine`: what this machine does well, measured once; see models/machine/card.py."""

import dataclasses
from typing import Annotated

import typer

from train.commands.common import check_json, write_results
from train.commands.console import make_console
from train.commands.options import JsonOption


def machine(
    *,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again, even if this machine is known.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Show what this machine does well: bandwidth, products, threads and the dtypes that pay."""
    check_json(json)
    from models.base.table import facts_table
    from models.machine.card import decoding_dtype, facts, machine_card, rates_table, training_dtype

    console = make_console()
    with console.status("measuring this machine"):
        card = machine_card(refresh)
    console.print(facts_table(facts(card)).to_rich())
    legend = "v(m): the time of a pass on m tokens, in passes on one"
    console.print(rates_table(card).to_rich(caption=legend))
    dtypes = {"training": training_dtype(card), "decoding": decoding_dtype(card)}
    write_results(json, {"machine": dataclasses.asdict(card)}, dtypes=dtypes)
