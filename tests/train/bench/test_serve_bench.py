"""`nestling bench --serve`, beside a server in this process."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from models.decode.decoder import open_decoder
from models.serve.listen import Address
from models.serve.server import Server
from models.serve.worker import Limits
from train.bench import serve_bench
from train.bench.serve_bench import ServeSettings, bench_serving
from train.cli import main


@contextlib.contextmanager
def in_this_process(model: Path, draft: str, settings: ServeSettings) -> Iterator[int]:
    decoder = open_decoder(model, draft=draft, dtype=settings.dtype)
    ready, urls = threading.Event(), list[str]()

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    server = Server(decoder, serve_bench.NAME, Address(port=0), Limits(), on_ready)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(120)
    yield int(urls[0].rpartition(":")[2])
    server.should_exit = True
    thread.join()


def test_a_row_for_each_draft_and_number_of_clients(
    monkeypatch: pytest.MonkeyPatch, byte_level_family: Path
) -> None:
    monkeypatch.setattr(serve_bench, "_server", in_this_process)
    monkeypatch.setattr(serve_bench, "CLIENTS", (1, 3))
    settings = ServeSettings(
        drafts=["D"],
        prompts=["def main(", "class "],
        max_new_tokens=6,
        temperature=0.0,
        dtype="fp32",
        gamma=None,
        rounds=2,
    )
    results = bench_serving(settings, model=byte_level_family, console=Console(quiet=True))
    rows = results["results"]
    assert [(row["draft"], row["num_clients"]) for row in rows] == [
        ("none", 1),
        ("none", 3),
        ("D", 1),
        ("D", 3),
    ]
    assert [row["num_tokens"] for row in rows] == [12, 36, 12, 36]
    assert [row["beside_a_slow_reader"] is None for row in rows] == [True, False] * 2
    assert all(row["speedup"] == 1 for row in rows[::2])


def test_what_has_no_effect_on_a_server_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "some/model", "--serve", "--engine", "transformers"]) == 2
    assert "--engine has no effect with --serve" in capsys.readouterr().err
    assert main(["bench", "some/model", "--serve", "--temperature", "0", "--temperature", "1"]) == 2
    assert "--temperature 0.0 1.0: --serve measures one at a time; give one" in capsys.readouterr().err
