"""`nestling plan split` and `nestling plan spread`: does it pay? See models/serve/pays.py."""

from enum import StrEnum
from typing import Annotated

import typer

from models.base.errors import UsageError
from train.commands.console import make_console
from train.commands.options import RttOption


class Plan(StrEnum):
    """What is planned."""

    SPLIT = "split"
    SPREAD = "spread"


WhatArgument = Annotated[
    Plan,
    typer.Argument(
        metavar="split|spread",
        help="split: draft on a device, verify on a server. spread: layers on several machines, draft here.",
    ),
]
AlphaOption = Annotated[
    float, typer.Option(help="Acceptance of a drafted token, as nestling evaluate measures it.")
]
TargetOption = Annotated[
    float,
    typer.Option(
        metavar="MS",
        help="Milliseconds of a target pass on one token: the server's, or all stages' together.",
    ),
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
StagesOption = Annotated[
    int | None, typer.Option(metavar="N", help="Number of stages that a pass goes through; for spread.")
]
HiddenSizeOption = Annotated[
    int | None, typer.Option(metavar="D", help="Width of the model, for --mbit; for spread.")
]
MbitOption = Annotated[
    float | None,
    typer.Option(metavar="MBIT", help="Megabits a second to a stage. Default: no limit; for spread."),
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
    stages: StagesOption = None,
    hidden_size: HiddenSizeOption = None,
    mbit: MbitOption = None,
    greedy: GreedyOption = False,
) -> None:
    """Say when it pays to decode over a network, beside what one would do else."""
    if not 0 <= alpha < 1:
        raise UsageError(f"--alpha must be from 0 to below 1, got {alpha:g}")
    costs = {"rtt": rtt, "target-ms": target_ms, "draft-ms": draft_ms, "slope": slope}
    for name, value in (costs | {"cloud-draft-ms": cloud_draft_ms or 0.0}).items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name} must be 0 or more, got {value:g}")
    if what == Plan.SPREAD:
        if cloud_draft_ms is not None:
            raise UsageError("--cloud-draft-ms has no effect with spread; leave it out")
        _plan_spread(rtt, alpha, target_ms, draft_ms, slope, stages, _transfer(hidden_size, mbit), greedy)
        return
    for name, one in (("stages", stages), ("hidden-size", hidden_size), ("mbit", mbit)):
        if one is not None:
            raise UsageError(f"--{name} has no effect with split; leave it out")
    _plan_split(rtt, alpha, target_ms, draft_ms, cloud_draft_ms, slope, greedy)


def _transfer(hidden_size: int | None, mbit: float | None) -> float:
    """Return the milliseconds of a token's states to a stage and back."""
    if (hidden_size is None) != (mbit is None):
        raise UsageError("--hidden-size and --mbit belong together; give both, or neither")
    if hidden_size is None or mbit is None:
        return 0.0
    if hidden_size < 1 or not 0 < mbit < float("inf"):
        raise UsageError(f"--hidden-size and --mbit must be above 0, got {hidden_size} and {mbit:g}")
    return 2 * 4 * hidden_size * 8 / (mbit * 1e6) * 1e3


def _plan_spread(
    rtt: float,
    alpha: float,
    target: float,
    draft: float,
    slope: float,
    stages: int | None,
    transfer: float,
    greedy: bool,
) -> None:
    if stages is None or stages < 1:
        raise UsageError(f"--stages must be at least 1 for spread, got {stages or 'none'}")
    from models.base.table import Table
    from models.serve.pays import SpreadPlan

    spread = SpreadPlan(
        alpha=alpha,
        target=target,
        draft=draft,
        stages=stages,
        slope=slope,
        transfer=transfer,
        greedy=greedy,
    )
    plain, (drafted, gamma) = spread.plain(rtt), spread.best(rtt)
    rows = (
        ("one machine that holds it all, plain", f"{target:.1f}", ""),
        (f"{stages} stages, plain", f"{plain:.1f}", ""),
        (f"{stages} stages, drafted here", f"{drafted:.1f}", str(gamma)),
    )
    console = make_console()
    console.print(Table(("how", "ms a token", "best gamma"), rows).to_rich())
    console.print(
        f"At {rtt:g} ms a local draft is {plain / drafted:.1f} times as fast as none. A drafted token is "
        f"kept with probability {spread.acceptance:.3f}.",
        soft_wrap=True,
    )


def _plan_split(
    rtt: float,
    alpha: float,
    target_ms: float,
    draft_ms: float,
    cloud_draft_ms: float | None,
    slope: float,
    greedy: bool,
) -> None:
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
    windowed, block = split.windowed(rtt)
    rows = (
        ("server alone, plain", f"{split.plain:.1f}", "", ""),
        ("server alone, drafted there", f"{drafted:.1f}", str(cloud_gamma), ""),
        ("split, waiting for each round", f"{waiting:.1f}", str(gamma), f"{split.most_rtt_waiting:.0f}"),
        ("split, a window of blocks", f"{windowed:.1f}", str(block), f"{split.most_rtt_windowed:.0f}"),
    )
    console = make_console()
    header = ("how", "ms a token", "best gamma", "beats plain up to ms of round trip")
    console.print(Table(header, rows).to_rich())
    best = min(waiting, windowed)
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
