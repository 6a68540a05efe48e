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

MIN_ROUNDS, MAX_ROUNDS = 3, 9


@dataclass(frozen=True)
class Timings(Generic[Cell]):
    """Seconds of each cell: its shortest run, and its median one."""

    shortest: dict[Cell, float]
    median: dict[Cell, float]

    @property
    def noise(self) -> float:
        """Excess of a typical run over the shortest one, as a fraction of it."""
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
        cells: functions to time, by name.
        budget: seconds to spend.
        clock: returns the time in seconds.
        before: functions that run, untimed, before each run of a cell, such as the cell itself, which then
            finds the caches as it leaves them.
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
