"""What every WebSocket of a server shares: sessions that outlive their connection, and the loop that answers.

first message    JSON: what is asked for, and perhaps a session to go on with
after it         binary frames, each answered by one; the third that is none ends the connection
"bye"            frees the session; without it a session waits a while for its client
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, TypeVar

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect

from models.base.errors import NestlingError
from models.serve.protocol import WireError

LEASE = 60.0
"""Seconds that a session outlives its connection."""
MAX_SESSIONS = 256
MAX_STRIKES = 3


@dataclass(eq=False, kw_only=True)
class Session:
    """What a server keeps for a client, for a while after it is gone, too."""

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    owner: object | None = None
    """The connection that it belongs to, if there is one: the last that asked for it."""
    left: float = 0.0
    """When its connection ended."""


Kind = TypeVar("Kind", bound=Session)


class Sessions(dict[str, Kind], Generic[Kind]):
    """The sessions of a server, by id.

    Args:
        free: called with a session that ends.
    """

    def __init__(self, free: Callable[[Kind], None]) -> None:
        super().__init__()
        self._free = free

    def find(self, name: str | None) -> Kind | None:
        """Return a session that is still here; forget those that nobody came back for."""
        self._expire()
        return self.get(name or "")

    def check_room(self) -> None:
        """Check that there may be one more.

        Raises:
            NestlingError: if there may not.
        """
        if len(self) >= MAX_SESSIONS:
            raise NestlingError("busy: too many sessions; come back later")

    def leave(self, session: Kind, owner: object) -> None:
        """Keep a session for its lease, unless another connection has it by now."""
        if session.owner is not owner:
            return
        session.owner, session.left = None, monotonic()
        asyncio.get_running_loop().call_later(LEASE + 1, self._expire)

    def end(self, session: Kind) -> None:
        """Free what a session holds."""
        if self.pop(session.id, None) is not None:
            self._free(session)

    def _expire(self) -> None:
        left = [one for one in self.values() if one.owner is None]
        for one in [one for one in left if monotonic() - one.left > LEASE]:
            self.end(one)


async def converse(
    socket: WebSocket,
    sessions: Sessions[Kind],
    start: Callable[[str], Awaitable[tuple[Kind | None, Mapping[str, Any]]]],
    answer: Callable[[Kind, bytes], Awaitable[bytes]],
    max_frame: int,
) -> None:
    """Speak with a client until either ends it.

    Args:
        socket: the connection.
        sessions: those of the server.
        start: returns the session that the first message asks for, owned by the connection, if it asks for
            any; and the answer.
        answer: answers a frame.
        max_frame: bytes of the longest frame.
    """
    await socket.accept()
    session = None
    try:
        message: Mapping[str, Any] = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        session, opened = await start(message.get("text") or "")
        await socket.send_text(json.dumps(opened))
        if session is None:
            await socket.close()
        else:
            await _answer_frames(socket, sessions, session, answer, max_frame)
    except WebSocketDisconnect:
        pass
    except NestlingError as error:
        await _refuse(socket, str(error))
    finally:
        if session is not None:
            sessions.leave(session, socket)


async def _answer_frames(
    socket: WebSocket,
    sessions: Sessions[Kind],
    session: Kind,
    answer: Callable[[Kind, bytes], Awaitable[bytes]],
    max_frame: int,
) -> None:
    strikes = 0
    while True:
        message: Mapping[str, Any] = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        frame = message.get("bytes")
        if frame is None and message.get("text") == "bye":
            sessions.end(session)
            await socket.close()
            return
        try:
            if frame is None or len(frame) > max_frame:
                raise WireError("frame: this is none")
            reply = await answer(session, frame)
        except WireError as error:
            strikes += 1
            if strikes >= MAX_STRIKES:
                raise
            await socket.send_text(json.dumps({"error": str(error)}))
        else:
            await socket.send_bytes(reply)


async def _refuse(socket: WebSocket, message: str) -> None:
    try:
        await socket.send_text(json.dumps({"error": message}))
        await socket.close(code=1008)
    except (RuntimeError, WebSocketDisconnect):  # it has gone already
        pass
