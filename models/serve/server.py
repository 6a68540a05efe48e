"""A server from a decoder: its address, its certificate, its signals.

    SIGTERM, SIGINT    no new connections; what was begun is finished, for `drain` seconds at most

Nothing listens beyond the loopback interface without TLS and a token, unless it is asked for as insecure.
"""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import time

import uvicorn

from models.base.errors import NestlingError, UsageError
from models.base.processor import free_memory_bytes
from models.decode.decoder import Decoder
from models.serve.app import Service, make_app
from models.serve.guard import Guard
from models.serve.load import tokens_within
from models.serve.metrics import Metrics
from models.serve.protocol import MAX_FRAME
from models.serve.served import default_name, serve_family
from models.serve.verify import Verifier, add_verification
from models.serve.worker import Limits, Worker

LEAST_TOKEN = 16
KEEP_ALIVE = 75
CHUNK_SECONDS = 0.05
"""What a pass may take longer because it reads some of a prompt."""


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


def serve(
    decoder: Decoder,
    *,
    name: str | None = None,
    address: Address | None = None,
    limits: Limits | None = None,
    verifies: bool = False,
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve a model and its family as `nestling serve` does, until a signal comes.

    Args:
        decoder: the model and its draft, as `open_decoder` opens them.
        name: that clients use; None is the run's.
        address: where it listens; None is port 8000 of this machine.
        limits: bounds; None are the usual ones, and a quarter of the free memory for keys and values.
        verifies: whether devices may send drafts.
        on_ready: called with the URL once it answers.

    Raises:
        NestlingError: if nothing can listen there.
    """
    limits = limits or Limits(kv_bytes=free_memory_bytes() // 4)
    name = name or default_name(decoder)
    Server(decoder, name, address or Address(), limits, on_ready, verifies=verifies).run()


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


class Server(uvicorn.Server):
    """A server of one model folder; `run` returns once it was stopped and its texts are finished.

    Args:
        decoder: the model and its draft.
        name: that clients use.
        address: where it listens.
        limits: bounds.
        verifies: whether devices may send drafts (models/serve/verify.py).
        on_ready: called with the URL once it answers.
    """

    def __init__(
        self,
        decoder: Decoder,
        name: str,
        address: Address,
        limits: Limits,
        on_ready: Callable[[str], None] = lambda _: None,
        *,
        verifies: bool = False,
    ) -> None:
        self.address, self.metrics, self._on_ready = address, Metrics(kv_budget=limits.kv_bytes), on_ready
        self.models, load = serve_family(decoder, name)
        self._loop: asyncio.AbstractEventLoop | None = None
        chunk = tokens_within(decoder.folder.model, CHUNK_SECONDS)
        limits = replace(limits, prefill_chunk=min(limits.prefill_chunk, chunk))
        self.worker = Worker(limits, self._post, self.metrics, load)
        service = Service(
            decoder=decoder,
            models=self.models,
            worker=self.worker,
            metrics=self.metrics,
            created=int(time()),
        )
        is_guarded = address.token is not None or address.insecure
        routes = make_app(service)
        self.verifier = Verifier(decoder, self.worker) if verifies else None
        if self.verifier is not None:
            add_verification(routes, self.verifier)
        app = Guard(routes, self.metrics, address.token, any_host=is_guarded)
        super().__init__(
            uvicorn.Config(
                app,
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
                ws="websockets-sansio" if verifies else "none",
                ws_max_size=MAX_FRAME * 16,  # an `open` holds the prompt
                ws_per_message_deflate=False,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or `should_exit`."""
        check_port(self.address)
        self.worker.start()
        try:
            asyncio.run(self.serve(sockets))
        finally:
            self.worker.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; says that it is ready."""
        self._loop = asyncio.get_running_loop()
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

    def _post(self, calls: Sequence[Callable[[], None]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            if self._loop is not None:
                self._loop.call_soon_threadsafe(_make, calls)


def _make(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


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
