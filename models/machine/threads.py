"""The one choice of thread counts: each work is timed with every number that may be its best.

The machine card's numbers are for weights that exceed the caches. A small model's passes may be over
before a second thread has woken up, so that models and engines are timed by their own work.
"""

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from models.base.stopwatch import Clock, Work, alternate

Name = TypeVar("Name", bound=Hashable)

# More threads must pay: fewer leave cores to others and wait less for each other.
MARGIN = 1.05


def thread_counts(most: int) -> list[int]:
    """Return the numbers of threads to try: powers of two, and the largest number.

    >>> thread_counts(6)
    [1, 2, 4, 6]
    """
    return sorted({2**power for power in range(most.bit_length())} | {most})


def fastest_threads(
    works: Mapping[Name, Work], counts: Sequence[int], *, budget: float, clock: Clock = time.perf_counter
) -> dict[Name, int]:
    """Return for each work the smallest number of threads in `counts` that is about as fast as the best one.

    Args:
        works: functions to time in turn, by name.
        counts: the numbers to try; torch's own number is set back afterwards.
        budget: seconds for all of them; every work runs at least thrice.
        clock: returns the time in seconds.
    """
    if len(counts) == 1:
        return dict.fromkeys(works, counts[0])
    grid = {(name, count): threaded(work, count) for count in counts for name, work in works.items()}
    before = torch.get_num_threads()
    try:
        seconds = alternate(grid, budget=budget, clock=clock).shortest
    finally:
        torch.set_num_threads(before)
    return {name: _fewest({count: seconds[name, count] for count in counts}) for name in works}


def threaded(work: Work, num_threads: int) -> Work:
    """Return the work as it runs with this number of threads."""

    def run() -> None:
        torch.set_num_threads(num_threads)
        work()

    return run


def _fewest(seconds: Mapping[int, float]) -> int:
    """Return the smallest number of threads that is about as fast as the best one.

    >>> _fewest({1: 2.0, 2: 1.0, 4: 0.99})
    2
    """
    best = min(seconds.values())
    return min(count for count, value in seconds.items() if value <= best * MARGIN)
