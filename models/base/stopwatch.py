"""A stopwatch for work that is compared: everything is timed in turn, round after round.

A disturbance then hits each alike; since it can only add time, a cell's time is the shortest of its runs.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

Cell = TypeVar("Cell", bound=Hashable)
Clock: TypeAlias = Callable[[], float]
Work: TypeAlias = Callable[[], None]

# More threads must pay: fewer leave cores to others and wait less for each other.
THREADS_MARGIN = 1.05
MIN_ROUNDS, MAX_ROUNDS = 3, 9


@dataclass(frozen=True)
class Timings(Generic[Cell]):
    """Seconds of each cell: its shortest run, and its median one."""

    shortest: dict[Cell, float]
    median: dict[Cell, float]

    @property
    def noise(self) -> float:
        """How much longer than the shortest a typical run took, as a share."""
        return statistics.median(self.median[cell] / self.shortest[cell] - 1 for cell in self.shortest)


def alternate(
    cells: Mapping[Cell, Work],
    *,
    budget: float,
    clock: Clock = time.perf_counter,
    before: Mapping[Cell, Work] | None = None,
) -> Timings[Cell]:
    """Warm every cell up, then run all of them in turn until `budget` seconds have passed.

    Each runs at least three times, whatever that takes, and at most nine.

    Args:
        cells: what is timed.
        budget: in seconds.
        clock: what tells the time, in seconds.
        before: what runs before a cell, each time, and is not timed; the cell itself, so that it finds
            the caches as it leaves them.
    """
    before = before or {}
    for cell, work in cells.items():
        if cell in before:
            before[cell]()
        work()
    runs: dict[Cell, list[float]] = {cell: [] for cell in cells}
    begin = clock()
    for num_rounds in range(MAX_ROUNDS):
        if num_rounds >= MIN_ROUNDS and clock() - begin > budget:
            break
        for cell, work in cells.items():
            if cell in before:
                before[cell]()
            start = clock()
            work()
            runs[cell].append(clock() - start)
    return Timings(
        shortest={cell: min(values) for cell, values in runs.items()},
        median={cell: statistics.median(values) for cell, values in runs.items()},
    )


def fewest_threads(seconds: Mapping[int, float]) -> int:
    """The smallest number of threads that is about as fast as the best one.

    >>> fewest_threads({1: 2.0, 2: 1.0, 4: 0.99})
    2
    """
    best = min(seconds.values())
    return min(num for num, value in seconds.items() if value <= best * THREADS_MARGIN)
