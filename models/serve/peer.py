"""A client's side of a WebSocket: where the other end is, how to speak with it, and when to try again."""

import contextlib
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar
from urllib.parse import urlsplit

from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from models.base.errors import NestlingError, UsageError

FIRST_PAUSE, MOST_PAUSE = 0.1, 2.0
"""Seconds between two tries to connect."""
TIMEOUT = 30.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Lost(NestlingError):
    """The connection or the session is gone; another one goes on."""


LOST = (OSError, WebSocketException, EOFError, Lost)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Where a server is, and how to speak with it."""

    flag: ClassVar[str]
    """The flag that names it."""
    command: ClassVar[str]
    """The command that starts it."""
    url: str
    """As ws://127.0.0.1:8000 or wss://HOST:PORT."""
    token: str | None = None
    ca: Path | None = None
    """Certificate to trust besides the system's."""
    timeout: float = TIMEOUT
    """Seconds without a server after which the text ends."""

    def __post_init__(self) -> None:
        try:
            parts, port = urlsplit(self.url), urlsplit(self.url).port
        except ValueError:  # no number, or beyond 65535
            parts, port = urlsplit(""), None
        if parts.scheme not in ("ws", "wss") or not parts.hostname or port == 0:
            raise UsageError(f"{self.flag} {self.url} is no address; give one as in wss://HOST:PORT")
        if parts.scheme == "ws" and parts.hostname not in LOOPBACK:
            raise UsageError(
                f"{self.flag} {self.url} is not encrypted; give wss://, or a tunnel's loopback address"
            )
        if not 0 < self.timeout < float("inf"):
            raise UsageError(f"--timeout must be above 0, got {self.timeout:g}")

    @contextlib.contextmanager
    def connect(self, path: str, max_size: int) -> Iterator[ClientConnection]:
        """Open a connection.

        Args:
            path: of the server's.
            max_size: bytes of the longest message that it may send.

        Raises:
            NestlingError: if the server refuses.
        """
        context = None
        if self.url.startswith("wss"):
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        try:
            with connect(
                f"{self.url.rstrip('/')}{path}",
                ssl=context,
                additional_headers=headers,
                compression=None,
                max_size=max_size,
                open_timeout=self.timeout,
                close_timeout=1,
                proxy=None,
            ) as socket:
                yield socket
        except InvalidStatus as error:
            status = error.response.status_code
            raise NestlingError(
                f"{self.flag} {self.url}: the server refuses ({status}); give its token with --token-file, "
                f"and see that it is one that nestling {self.command} started"
            ) from None


class Patience:
    """Waits between tries, longer and longer, until the peer's timeout."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.reset()

    def reset(self) -> None:
        """Begin to count: something came."""
        self._last, self._pause = perf_counter(), FIRST_PAUSE

    @property
    def is_new(self) -> bool:
        """True before the first wait."""
        return self._pause == FIRST_PAUSE

    def wait(self, error: Exception) -> None:
        """Wait for the next try.

        Raises:
            NestlingError: if nothing came for too long.
        """
        if perf_counter() - self._last > self._peer.timeout:
            raise NestlingError(
                f"{self._peer.flag} {self._peer.url}: no server answers ({type(error).__name__}: {error}); "
                "start it, and generate again: the text up to here will be the same"
            ) from None
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, MOST_PAUSE)


def ask(socket: ClientConnection, asked: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Send the first message of a connection and return the answer."""
    socket.send(json.dumps(asked))
    return checked(socket.recv(timeout))


def checked(answer: str | bytes) -> dict[str, Any]:
    """Return an answer in JSON.

    Raises:
        NestlingError: if it is a refusal, or none; `Lost` if that may pass.
    """
    try:
        fields = json.loads(answer)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise NestlingError("the server sent what is no answer; is it nestling's?")
    if "error" in fields:
        error = str(fields["error"])
        kind = Lost if error.startswith(("busy", "the server stops")) else NestlingError
        raise kind(f"the server refuses: {error}")
    return fields
