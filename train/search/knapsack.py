"""The multiple-choice knapsack, exactly: one option for each layer, the whole frontier in one pass.

After each layer only the choices are kept that no other one beats in both cost and loss; every prefix of a
best choice is one of them, so nothing is lost.

P points, K options.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 8192
"""Costs that are no whole numbers are rounded up to this fraction of the most expensive choice."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A choice on the frontier: no other one is at most as expensive and at most as bad.

    Args:
        cost: sum of the costs of the options.
        loss: sum of their losses.
        choice: the option of each layer.
    """

    cost: float
    loss: float
    choice: tuple[int, ...]


def knapsack_frontier(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], *, exact: bool = True
) -> list[Point]:
    """Return the frontier, the cheapest first: each point costs more than the one before, and loses less.

    Args:
        costs: of each layer, of each option.
        losses: likewise.
        exact: False rounds costs up to `RESOLUTION` steps, which bounds the points that are kept.

    >>> for point in knapsack_frontier([[1, 2, 4], [1, 2, 4]], [[5, 3, 0], [4, 1, 0]]):
    ...     print(f"{point.cost:g} {point.loss:g} {point.choice}")
    2 9 (0, 0)
    3 6 (0, 1)
    4 4 (1, 1)
    6 1 (2, 1)
    8 0 (2, 2)
    """
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    step = 0.0 if exact else sum(map(max, costs)) / RESOLUTION
    costs_P, losses_P = np.zeros(1), np.zeros(1)
    for layer_costs, layer_losses in zip(costs, losses, strict=True):
        costs_K = np.asarray(layer_costs, dtype=np.float64)
        if step:
            costs_K = np.ceil(costs_K / step - 1e-9)
        all_costs = (costs_P[:, None] + costs_K).ravel()
        all_losses = (losses_P[:, None] + np.asarray(layer_losses, dtype=np.float64)).ravel()
        kept = _undominated(all_costs, all_losses)
        steps.append(divmod(kept, len(costs_K)))
        costs_P, losses_P = all_costs[kept], all_losses[kept]
    return [_point(costs, losses, _trace(steps, place)) for place in range(len(costs_P))]


def _undominated(costs_P: NDArray[np.float64], losses_P: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the places of choices that none beats, by rising cost."""
    order = np.lexsort((losses_P, costs_P))
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses_P[order]]))[:-1]
    return order[losses_P[order] < best_before]


def _trace(steps: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], place: int) -> tuple[int, ...]:
    """Return the options that led to a point."""
    choice: list[int] = []
    for parents_P, options_P in reversed(steps):
        choice.append(int(options_P[place]))
        place = int(parents_P[place])
    return tuple(reversed(choice))


def _point(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], choice: tuple[int, ...]
) -> Point:
    return Point(
        cost=sum(layer[option] for layer, option in zip(costs, choice, strict=True)),
        loss=sum(layer[option] for layer, option in zip(losses, choice, strict=True)),
        choice=choice,
    )
