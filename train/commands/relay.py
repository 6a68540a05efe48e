"""`nestling relay`: a far network on this machine, for tests and measurements; see models/serve/relay.py."""

import asyncio
import signal
from typing import Annotated

import typer

from models.base.errors import NestlingError, UsageError
from train.commands.console import make_console
from train.commands.options import RttOption, SeedOption

ListenOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port of this machine to listen at; 0 takes one that is free.")
]
ToOption = Annotated[str, typer.Option(metavar="HOST:PORT", help="Server to pass all on to.")]
JitterOption = Annotated[
    float, typer.Option(metavar="MS", help="Milliseconds that each block may take longer.")
]
RateOption = Annotated[
    float | None, typer.Option(metavar="MBIT", help="Megabits a second in each direction. Default: no limit.")
]
CutOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Blocks after which a connection is cut. Default: none is."),
]
CutsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Number of connections that are cut. Default: all.")
]


def relay(
    to: ToOption,
    *,
    listen: ListenOption = 0,
    rtt: RttOption = 0.0,
    jitter: JitterOption = 0.0,
    rate: RateOption = None,
    cut_after: CutOption = None,
    cuts: CutsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Pass connections on to a server as if it were far: with delay, jitter, a bounded rate and cuts."""
    host, colon, port = to.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(f"--to {to} is no address; give one as in 127.0.0.1:8000")
    from models.serve.relay import Link, Relay

    link = Link(
        rtt=rtt / 1e3,
        jitter=jitter / 1e3,
        rate=None if rate is None else rate * 1e6 / 8,
        cut_after=cut_after,
        cuts=cuts,
        seed=seed,
    )
    console = make_console()

    def on_ready(own: int) -> None:
        console.print(f"127.0.0.1:{own} -> {to}, {rtt:g} ms a round trip", markup=False, soft_wrap=True)
        console.file.flush()

    try:
        asyncio.run(_until_signal(Relay(link, host, int(port)), listen, on_ready))
    except OSError as error:
        raise NestlingError(
            f"--listen {listen}: nothing can listen there ({error}); choose another"
        ) from None


async def _until_signal(relay: object, port: int, on_ready: object) -> None:
    from models.serve.relay import Relay

    assert isinstance(relay, Relay)
    assert callable(on_ready)
    task = asyncio.ensure_future(relay.serve(port, on_ready))
    for one in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(one, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return
