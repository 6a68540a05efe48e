"""`nestling plan split`: does drafting on a device pay, with a server to verify? See models/serve/pays.py."""

from enum import StrEnum
from typing import Annotated

import typer

from models.base.errors import UsageError
from train.commands.console import make_console
from train.commands.options import RttOption


class Plan(StrEnum):
    """What is planned."""

    SPLIT = "split"


WhatArgument = Annotated[
    Plan, typer.Argument(metavar="split", help="split: draft on a device, verify on a server.")
]
AlphaOption = Annotated[
    float, typer.Option(help="Acceptance of a drafted token, as nestling evaluate measures it.")
]
TargetOption = Annotated[
    float, typer.Option(metavar="MS", help="Milliseconds of a target pass on one token, on the server.")
]
DraftMsOption = Annotated[
    float, typer.Option(metavar="MS", help="Milliseconds of a drafted token on the device.")
]
CloudDraftOption = Annotated[
    float | None,
    typer.Option(metavar="MS", help="Milliseconds of a drafted token on the server. Default: --draft-ms."),
]
SlopeOption = Annotated[
    float,
    typer.Option(help="What a further token adds to a target pass, as a fraction of it."),
]
GreedyOption = Annotated[
    bool, typer.Option("--greedy", help="Decode greedily: drafts are kept with the full acceptance.")
]


def plan(
    what: WhatArgument,
    *,
    rtt: RttOption,
    alpha: AlphaOption,
    target_ms: TargetOption,
    draft_ms: DraftMsOption,
    cloud_draft_ms: CloudDraftOption = None,
    slope: SlopeOption = 0.012,
    greedy: GreedyOption = False,
) -> None:
    """Say when drafting on a device and verifying on a server pays, beside the server alone."""
    del what  # there is one
    if not 0 <= alpha < 1:
        raise UsageError(f"--alpha must be from 0 to below 1, got {alpha:g}")
    costs = {"rtt": rtt, "target-ms": target_ms, "draft-ms": draft_ms, "slope": slope}
    for name, value in (costs | {"cloud-draft-ms": cloud_draft_ms or 0.0}).items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name} must be 0 or more, got {value:g}")
    from models.base.table import Table
    from models.serve.pays import SplitPlan

    split = SplitPlan(
        alpha=alpha,
        target=target_ms,
        draft=draft_ms,
        cloud_draft=draft_ms if cloud_draft_ms is None else cloud_draft_ms,
        slope=slope,
        greedy=greedy,
    )
    drafted, cloud_gamma = split.drafted
    waiting, gamma = split.waiting(rtt)
    rows = (
        ("server alone, plain", f"{split.plain:.1f}", "", ""),
        ("server alone, drafted there", f"{drafted:.1f}", str(cloud_gamma), ""),
        ("split, waiting for each round", f"{waiting:.1f}", str(gamma), f"{split.most_rtt_waiting:.0f}"),
        ("split, a window of blocks", f"{split.windowed(rtt):.1f}", "", f"{split.most_rtt_windowed:.0f}"),
    )
    console = make_console()
    header = ("how", "ms a token", "best gamma", "beats plain up to ms of round trip")
    console.print(Table(header, rows).to_rich())
    best = min(waiting, split.windowed(rtt))
    faster = "pays" if best < split.plain else "does not pay"
    beside = (
        ""
        if best >= split.plain
        else (
            ", and beats drafting there"
            if best < drafted
            else ", but drafting there is faster; it spares the server"
        )
    )
    console.print(
        f"At {rtt:g} ms split decoding {faster}{beside}. A drafted token "
        f"is kept with probability {split.coupled:.3f}.",
        soft_wrap=True,
    )
