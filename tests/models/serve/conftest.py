"""A server of a very small family, in a thread of this process."""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from models.decode.decoder import Decoder, open_decoder
from models.decode.engine.scheduler import BatchScheduler
from models.serve.listen import Address, Listener
from models.serve.relay import Link, Relay
from models.serve.server import Server
from models.serve.worker import Limits

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}"
    "{{ raise_exception('a conversation begins with its user') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
)
PATIENCE = 120
"""Seconds that a machine at work on other things may need for what takes none."""
Start = Callable[..., "contextlib.AbstractContextManager[Served]"]


class Served:
    """A running server, and how to ask it."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "tiny", "temperature": 0, **fields})

    def text(self, prompt: str, **fields: Any) -> str:
        response = self.complete(prompt=prompt, **fields)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


@contextlib.contextmanager
def listening(make: Callable[[Callable[[str], None]], Listener]) -> Iterator[tuple[Any, str]]:
    """Run a server in a thread of this process."""
    ready, urls = threading.Event(), list[str]()

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    server = make(on_ready)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield server, urls[0]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextlib.contextmanager
def running(
    decoder: Decoder, *, address: Address | None = None, verifies: bool = False, **limits: int
) -> Iterator[Served]:
    bounds = Limits(**({"kv_bytes": 2**24} | limits))
    where = address or Address(port=0)

    def make(on_ready: Callable[[str], None]) -> Listener:
        return Server(decoder, "tiny", where, bounds, on_ready, verifies=verifies)

    with listening(make) as (server, url):
        served = Served(server, url)
        try:
            yield served
        finally:
            served.http.close()
            served.openai.close()


@contextlib.contextmanager
def relaying(url: str, link: Link) -> Iterator[tuple[str, Relay]]:
    """Put a relay before a server."""
    relay = Relay(link, "127.0.0.1", int(url.rpartition(":")[2]))
    ready, ports, stops = threading.Event(), list[int](), list[Callable[[], object]]()

    def on_ready(port: int) -> None:
        ports.append(port)
        ready.set()

    async def work() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        stops.append(lambda: loop.call_soon_threadsafe(task.cancel))
        with contextlib.suppress(asyncio.CancelledError):
            await relay.serve(0, on_ready)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(PATIENCE)
    try:
        yield f"ws://127.0.0.1:{ports[0]}", relay
    finally:
        stops[0]()
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Passes:
    """Passes of a model wait until the test lets some begin, or all: so a text lasts as long as it must."""

    def __init__(self) -> None:
        self._permits, self._free = threading.Semaphore(0), False

    def wait(self) -> None:
        if not self._free:
            self._permits.acquire(timeout=PATIENCE)  # which ends a test that failed

    def let(self, number: int) -> None:
        self._permits.release(number)

    def let_all(self) -> None:
        self._free = True
        self._permits.release()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    held, step = Passes(), BatchScheduler.step

    def held_step(scheduler: BatchScheduler[Any]) -> Any:
        held.wait()
        return step(scheduler)

    monkeypatch.setattr(BatchScheduler, "step", held_step)
    return held


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_level_family: Path) -> Path:
    """The family with a chat template."""
    path = tmp_path_factory.mktemp("serve") / "model"
    shutil.copytree(byte_level_family, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="package")
def decoder(folder: Path) -> Decoder:
    """The family with a draft of its first layers."""
    torch.set_num_threads(1)
    return open_decoder(folder, draft="D", dtype="fp32")


@pytest.fixture(scope="package")
def start() -> Start:
    """Start servers with other settings."""
    return running


@pytest.fixture(scope="package")
def listen() -> Callable[..., Any]:
    """Run other servers."""
    return listening


@pytest.fixture(scope="package")
def relayed() -> Callable[..., Any]:
    """Make a far network of a near one."""
    return relaying


@pytest.fixture(scope="package")
def served(decoder: Decoder) -> Iterator[Served]:
    """A server that drafts by its load."""
    with running(decoder) as one:
        yield one
