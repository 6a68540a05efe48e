"""Where a server listens, to whom, and when it stops.

    SIGTERM, SIGINT    no new connections; what was begun is finished, for `drain` seconds at most

Nothing listens beyond the loopback interface without TLS and a token, unless it is asked for as insecure.
"""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from models.base.errors import NestlingError, UsageError
from models.serve.guard import Guard
from models.serve.metrics import Metrics

LEAST_TOKEN = 16
KEEP_ALIVE = 75


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and to whom."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any that is free."""
    cert: Path | None = None
    key: Path | None = None
    token: str | None = None
    insecure: bool = False
    drain: int = 30
    """Seconds that texts have to come to their end when the server stops."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise UsageError("--cert and --key belong together; give both, or neither")
        missing = [
            name for name, it in (("--cert, --key", self.cert), ("--token-file", self.token)) if not it
        ]
        if missing and not self.insecure and not is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} can be reached from other machines: give {' and '.join(missing)} too, "
                "or --insecure if something else protects it"
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the host.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(path: Path) -> str:
    """Return the token that a file holds, in its first line.

    Raises:
        UsageError: if it is too short to be a secret.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"--token-file {path} is no file of ASCII text that can be read; write one"
        ) from None
    if len(token) < LEAST_TOKEN or token.split() != [token]:
        raise UsageError(
            f"--token-file {path} must hold one word of at least {LEAST_TOKEN} characters; write one, as in "
            "openssl rand -hex 32"
        )
    return token


class Listener(uvicorn.Server):
    """A server of an application behind its guard; `run` returns once it was stopped.

    Args:
        app: what is served.
        metrics: counts.
        address: where it listens.
        on_ready: called with the URL once it answers.
        max_message: bytes of a message of a WebSocket; None has none.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        address: Address,
        on_ready: Callable[[str], None],
        max_message: int | None = None,
    ) -> None:
        self.address, self._on_ready = address, on_ready
        self.loop: asyncio.AbstractEventLoop | None = None
        is_guarded = address.token is not None or address.insecure
        sockets: dict[str, Any] = {"ws": "none"}
        if max_message is not None:
            sockets = {
                "ws": "websockets-sansio",
                "ws_max_size": max_message,
                "ws_per_message_deflate": False,
            }
        super().__init__(
            uvicorn.Config(
                Guard(app, metrics, address.token, any_host=is_guarded),
                host=address.host,
                port=address.port,
                ssl_certfile=address.cert,
                ssl_keyfile=address.key,
                timeout_graceful_shutdown=address.drain,
                timeout_keep_alive=KEEP_ALIVE,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                **sockets,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or `should_exit`."""
        check_port(self.address)
        asyncio.run(self.serve(sockets))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; says that it is ready."""
        self.loop = asyncio.get_running_loop()
        if self.config.ssl is not None:
            # A client that reads a ticket in one thread while it writes in another may wait for ever: OpenSSL
            # does not let two threads use a connection at once, and the client's library does.
            self.config.ssl.num_tickets = 0
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            name = f"[{host}]" if ":" in host else host
            self._on_ready(f"{'https' if self.address.cert else 'http'}://{name}:{port}")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on a signal; unlike uvicorn's own, raise none afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for one in signals:
            loop.add_signal_handler(one, self.handle_exit, one, None)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)


def check_port(address: Address) -> None:
    """Say in one line that nothing can listen there.

    Raises:
        NestlingError: naming the flag.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except (OSError, OverflowError) as error:
        raise NestlingError(
            f"--host {address.host} --port {address.port}: nothing can listen there ({error}); choose others"
        ) from None
