"""`nestling bench MODEL --serve`: tokens a second and the time between tokens, by the number of clients.

A server of its own process for each draft, plain decoding first; its clients ask one request after another,
all of the same length. At the end as many clients ask once more, one of which never reads what it is sent.
"""

import asyncio
import contextlib
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

from rich.console import Console

from models.base.errors import NestlingError
from models.base.numbers import fixed, optional
from models.base.progress import progress_bar
from models.base.table import Columns, Table
from models.decode.engine.policy import NO_DRAFT
from train.bench.serve_client import Exchange, ask_all, ask_and_never_read

CLIENTS = (1, 2, 4, 8, 16)
NAME = "model"
RUN = "import sys; from nestling import main; sys.exit(main())"
SECONDS_TO_START = 300
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of the comparison."""

    drafts: Sequence[str]
    prompts: Sequence[str]
    max_new_tokens: int
    temperature: float
    dtype: str
    gamma: str | None
    rounds: int
    """Requests of each client."""


def bench_serving(settings: ServeSettings, *, model: Path, console: Console) -> dict[str, Any]:
    """Measure a server, and return the fields of docs/json.md but the card."""
    drafts = dict.fromkeys([NO_DRAFT, *settings.drafts])
    rows: list[Row] = []
    with progress_bar("serving", len(drafts) * (len(CLIENTS) + 1), console=console) as bar:
        for draft in drafts:
            with _server(model, draft, settings) as port:
                asyncio.run(ask_all(port, _bodies(settings, 2)))  # caches and threads get warm
                for num_clients in CLIENTS:
                    rows.append(_measure(port, draft, num_clients, settings))
                    bar.advance()
                rows[-1]["beside_a_slow_reader"] = _beside_a_slow_reader(port, settings) / rows[-1]["seconds"]
                bar.advance()
    for row in rows:
        alone = next(one for one in rows if one["draft"] == row["draft"])
        row["speedup"] = row["tokens_per_second"] / alone["tokens_per_second"]
    return {
        "results": rows,
        "model": str(model),
        "num_prompts": len(settings.prompts),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "rounds": settings.rounds,
    }


COLUMNS: Columns = {
    "draft": ("draft", str),
    "num_clients": ("clients", str),
    "tokens_per_second": ("tokens/s", fixed(1)),
    "speedup": ("over one client", fixed(2, "x")),
    "seconds_to_first_token": ("first token, ms", lambda value: f"{1e3 * value:.1f}"),
    "seconds_per_token": ("per token, ms", lambda value: f"{1e3 * value:.2f}"),
    "longest_gaps": ("p99 between pieces, ms", lambda value: f"{1e3 * value:.1f}"),
    "tau": ("tau", lambda value: optional(value, fixed(2))),
    "alpha": ("alpha", lambda value: optional(value, fixed(3))),
    "beside_a_slow_reader": ("time beside a slow reader", lambda value: optional(value, fixed(2, "x"))),
}


def show_serving(results: Mapping[str, Any], console: Console) -> None:
    """Print a table."""
    console.print(Table.of(results["results"], COLUMNS, labels=["draft", "num_clients"]).to_rich())


@contextlib.contextmanager
def _server(model: Path, draft: str, settings: ServeSettings) -> Iterator[int]:
    """Run a server in a process of its own; give its port."""
    words = ["serve", str(model), "--draft", draft, "--port", "0", "--name", NAME, "--dtype", settings.dtype]
    words += ["--gamma", settings.gamma] if settings.gamma else []
    command = [sys.executable, "-c", RUN, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            found = re.search(r"://[^ ]*:(\d+)/v1", line)
            if found is None:
                raise NestlingError(f"the server did not start: {process.stderr.read().strip() or line}")
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)


def _bodies(settings: ServeSettings, num_clients: int) -> list[list[dict[str, Any]]]:
    """Return the requests of each client; prompts take turns, and none begins as another one did."""
    prompts, run = [*settings.prompts], secrets.token_hex(4)
    return [
        [
            {
                "model": NAME,
                "prompt": f"{client}.{turn} {run} {prompts[(client + turn * num_clients) % len(prompts)]}",
                "max_tokens": settings.max_new_tokens,
                "temperature": settings.temperature,
                "seed": turn,
                "ignore_eos": True,
            }
            for turn in range(settings.rounds)
        ]
        for client in range(num_clients)
    ]


def _measure(port: int, draft: str, num_clients: int, settings: ServeSettings) -> Row:
    started = perf_counter()
    exchanges = asyncio.run(ask_all(port, _bodies(settings, num_clients)))
    return _row(exchanges, perf_counter() - started) | {"draft": draft, "num_clients": num_clients}


def _row(exchanges: Sequence[Exchange], seconds: float) -> Row:
    gaps = sorted(gap for one in exchanges for gap in one.gaps)
    rates = [
        (one.arrivals[-1] - one.arrivals[0]) / (one.num_tokens - 1) for one in exchanges if one.num_tokens > 1
    ]
    alphas = [one.usage["alpha"] for one in exchanges if one.usage["alpha"] is not None]
    taus = [one.usage["tau"] for one in exchanges if one.usage["tau"] is not None]
    num_tokens = sum(one.num_tokens for one in exchanges)
    return {
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
        "num_tokens": num_tokens,
        "seconds_to_first_token": median(one.seconds_to_first_token for one in exchanges),
        "seconds_per_token": median(rates) if rates else None,
        "longest_gaps": gaps[int(0.99 * (len(gaps) - 1))] if gaps else None,
        "tau": mean(taus) if taus else None,
        "alpha": mean(alphas) if alphas else None,
        "beside_a_slow_reader": None,
    }


def _beside_a_slow_reader(port: int, settings: ServeSettings) -> float:
    """Return the seconds of the most clients, one of which never reads, until the others are done."""

    async def work() -> float:
        *bodies, [slow, *_] = _bodies(settings, CLIENTS[-1])
        done = asyncio.Event()
        reader = asyncio.create_task(ask_and_never_read(port, slow, done))
        started = perf_counter()
        await ask_all(port, bodies)
        seconds = perf_counter() - started
        done.set()
        await reader
        return seconds

    return asyncio.run(work())
