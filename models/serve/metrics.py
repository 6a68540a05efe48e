"""Counts of a server since it started, and their text for Prometheus."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING

from models.decode.engine.report import Report

if TYPE_CHECKING:
    from models.serve.job import Job

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histograms, in seconds."""


@dataclass
class Histogram:
    """How often a time was in each interval."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count a time."""
        self.counts[bisect_left(BOUNDS, seconds)] += times
        self.total += seconds * times


@dataclass
class Metrics:
    """Counts; each is written by one thread, and may be read by any."""

    started: float = field(default_factory=time)
    responses: "Counter[int]" = field(default_factory=Counter)
    """Responses by status."""
    queued: int = 0
    running: int = 0
    kv_bytes: int = 0
    kv_budget: int = 0
    cancelled: int = 0
    texts: int = 0
    """Texts that came to their end."""
    text_seconds: float = 0.0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    """Tokens of prompts that were not read again."""
    tokens: int = 0
    rounds: int = 0
    round_tokens: int = 0
    """Tokens of these rounds."""
    drafted: int = 0
    accepted: int = 0
    overlap: float = 0.0
    reached: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)

    def count_tokens(self, job: "Job", num: int, last: float | None, now: float) -> None:
        """Count the tokens of a round; those of one round share the time since the round before."""
        self.tokens += num
        if num and last is None:
            self.first_token.add(now - job.submitted)
        elif num and last is not None:
            self.between_tokens.add((now - last) / num, num)

    def count_text(self, report: Report, seconds: float) -> None:
        """Count a text that is over."""
        self.texts += 1
        self.text_seconds += seconds
        self.rounds += report.rounds
        self.round_tokens += max(0, report.num_tokens - 1)
        self.drafted += report.drafted
        self.accepted += report.accepted
        self.overlap += report.overlap
        self.reached += report.reached

    def seconds_to_wait(self, num_waiting: int, batch: int) -> int:
        """Return about how many seconds a queue takes, from 1 to 60."""
        mean = self.text_seconds / self.texts if self.texts else 1.0
        return min(60, max(1, math.ceil(mean * num_waiting / batch)))

    def as_prometheus(self) -> str:
        """Return all as text (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield "# HELP nestling_responses_total Responses by HTTP status."
        yield "# TYPE nestling_responses_total counter"
        for status, count in sorted(self.responses.items()):
            yield f'nestling_responses_total{{status="{status}"}} {count}'
        for name, (kind, meaning) in _FIELDS.items():
            label = f"nestling_{name}{'_total' if kind == 'counter' else ''}"
            yield f"# HELP {label} {meaning}"
            yield f"# TYPE {label} {kind}"
            yield f"{label} {getattr(self, name)}"
        yield from _histogram("time_to_first_token", "Seconds until the first token.", self.first_token)
        yield from _histogram("time_per_token", "Seconds between tokens.", self.between_tokens)


_FIELDS = {
    "started": ("gauge", "Unix time of the start."),
    "queued": ("gauge", "Texts that wait."),
    "running": ("gauge", "Texts that are being written."),
    "kv_bytes": ("gauge", "Bytes of keys and values, those kept for later prompts included."),
    "kv_budget": ("gauge", "The most bytes of keys and values."),
    "cancelled": ("counter", "Texts whose client went away."),
    "texts": ("counter", "Texts that came to their end."),
    "prompt_tokens": ("counter", "Tokens of prompts."),
    "shared_tokens": ("counter", "Tokens of prompts that were read before."),
    "tokens": ("counter", "Tokens written."),
    "rounds": ("counter", "Target passes of texts, the first one left out."),
    "round_tokens": ("counter", "Tokens of these rounds: round_tokens / rounds is tau."),
    "drafted": ("counter", "Tokens that drafts proposed."),
    "accepted": ("counter", "Drafted tokens that were kept."),
    "overlap": ("counter", "Sum of min(p, q) at drafted positions that were reached."),
    "reached": ("counter", "Drafted positions that were reached: overlap / reached is alpha."),
}


def _histogram(name: str, meaning: str, histogram: Histogram) -> Iterator[str]:
    label = f"nestling_{name}_seconds"
    yield f"# HELP {label} {meaning}"
    yield f"# TYPE {label} histogram"
    bounds: Sequence[str] = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
    count = 0
    for bound, each in zip(bounds, histogram.counts, strict=True):
        count += each
        yield f'{label}_bucket{{le="{bound}"}} {count}'
    yield f"{label}_sum {histogram.total:.6f}"
    yield f"{label}_count {count}"
