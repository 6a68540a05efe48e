"""A client of `nestling serve` that costs little: it reads lines of a stream and keeps the time.

It speaks as much HTTP as its own server needs. A client with more to do would take the server's processor.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from models.base.errors import NestlingError


@dataclass
class Exchange:
    """One request: when its pieces came."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that were written."""
        return int(self.usage["completion_tokens"])

    @property
    def seconds_to_first_token(self) -> float:
        """Time until the first piece."""
        return self.arrivals[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [later - one for one, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


async def ask(port: int, body: dict[str, Any]) -> Exchange:
    """Send a completion request, and read its stream to the end.

    Raises:
        NestlingError: if the server refuses or fails.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        exchange = Exchange(perf_counter())
        await _send(writer, body)
        status = int((await reader.readline()).split()[1])
        async for line in reader:
            if line.startswith(b"data: [DONE]"):
                return exchange
            if line.startswith(b"data: {"):
                _take(exchange, line)
            elif line.startswith(b'{"error"'):
                break
        raise NestlingError(
            f"the server answered {status} and no text: {line.decode(errors='replace')[:200]}"
        )
    finally:
        writer.close()


async def ask_and_never_read(port: int, body: dict[str, Any], until: asyncio.Event) -> None:
    """Send a request and leave its stream where it is, until others are done."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
    await _send(writer, body)
    await until.wait()
    writer.close()


async def ask_all(port: int, bodies: Sequence[Sequence[dict[str, Any]]]) -> list[Exchange]:
    """Let some clients ask at the same time, each its requests one after another."""

    async def client(own: Sequence[dict[str, Any]]) -> list[Exchange]:
        return [await ask(port, body) for body in own]

    return [one for each in await asyncio.gather(*map(client, bodies)) for one in each]


async def _send(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + content)
    await writer.drain()


def _take(exchange: Exchange, line: bytes) -> None:
    if b'"choices":[]' in line:
        exchange.usage = json.loads(line[6:])["usage"]
    elif b'{"error"' in line:
        raise NestlingError(f"the server failed: {json.loads(line[6:])['error']['message']}")
    else:
        exchange.arrivals.append(perf_counter())
