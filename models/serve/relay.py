"""A relay between a client and a server that makes a far network of a near one: delay, jitter, rate, cuts.

Each direction is a queue of (time of release, bytes): order is kept, as TCP keeps it. It models the time that
an application sees, not how TCP recovers what is lost or how it starts slowly.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from models.base.errors import UsageError

BLOCK = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Link:
    """How far the two ends are."""

    rtt: float = 0.0
    """Seconds of a round trip; half of it in each direction."""
    jitter: float = 0.0
    """Seconds that each block may take longer, evenly distributed."""
    rate: float | None = None
    """Bytes a second in each direction; None sets no limit."""
    cut_after: int | None = None
    """Blocks of a connection, of both directions, after which it is cut; None never cuts it."""
    cuts: int | None = None
    """Number of connections that are cut; None cuts each."""
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"rtt": self.rtt, "jitter": self.jitter, "rate": self.rate}
        bounds |= {"cut_after": self.cut_after, "cuts": self.cuts}
        for name, value in bounds.items():
            if value is not None and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} must be 0 or more, got {value:g}")


class Relay:
    """Listens at a port of loopback and passes all on to another; see `Link`.

    Args:
        link: how far.
        host: where the server is.
        port: its port.
    """

    def __init__(self, link: Link, host: str, port: int) -> None:
        self._link, self._host, self._port = link, host, port
        self._random = random.Random(link.seed)
        self.num_connections = 0

    async def serve(self, port: int, on_ready: Callable[[int], None]) -> None:
        """Serve until cancelled; 0 takes a port that is free."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", port)
        async with server:
            on_ready(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        is_cut = self._link.cuts is None or self.num_connections <= self._link.cuts
        left = _Countdown(self._link.cut_after if is_cut else None)
        try:
            theirs, ours = await asyncio.open_connection(self._host, self._port)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        ways = [
            asyncio.create_task(self._pass_on(reader, ours, left)),
            asyncio.create_task(self._pass_on(theirs, writer, left)),
            asyncio.create_task(left.over.wait()),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            try:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:  # the relay may be stopped meanwhile
                for end in (writer, ours):
                    end.transport.abort() if left.over.is_set() else end.close()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: "_Countdown"
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        sending = asyncio.create_task(_release(queue, writer, left))
        loop, free = asyncio.get_running_loop(), 0.0
        try:
            while block := await reader.read(BLOCK):
                now = loop.time()
                free = max(free, now) + (len(block) / self._link.rate if self._link.rate else 0.0)
                late = self._link.rtt / 2 + self._random.uniform(0, self._link.jitter)
                queue.put_nowait((free + late, block))
                if sending.done():
                    return
            queue.put_nowait((loop.time() + self._link.rtt / 2, b""))
            await sending
        except OSError:
            pass
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sending


class _Countdown:
    def __init__(self, blocks: int | None) -> None:
        self._left, self.over = blocks, asyncio.Event()

    def count(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self.over.set()


async def _release(
    queue: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter, left: _Countdown
) -> None:
    """Send each block when its time has come; return at the end or the cut."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while not left.over.is_set():
            at, block = await queue.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            if not block or left.over.is_set():
                return
            writer.write(block)
            await writer.drain()
            left.count()
