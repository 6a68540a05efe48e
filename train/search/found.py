"""What a search under a budget found: members that were measured, and how well they had been predicted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.elastic.granularity import Granularity
from models.measure.token_losses import Difference


@dataclass(frozen=True, kw_only=True)
class Found:
    """A member that was measured.

    Args:
        name: its name in the family; None for one that was not trained.
        member: its granularity.
        origin: trained, uniform, heuristic or found.
        costs: kind of budget -> what it costs.
        predicted: the proxy's loss; None for a member that it does not know.
        loss: nats per token.
        above: loss above the full model's; `error` is its standard error.
        error: see `above`.
        fits: whether it keeps all budgets.
    """

    name: str | None
    member: Granularity
    origin: str
    costs: Mapping[str, float]
    predicted: float | None
    loss: float
    above: float
    error: float
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How much more the chosen member loses than the best other one of an origin within the budgets."""

    other: Found
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search found.

    Args:
        found: measured members, the cheapest first.
        best: the member that loses least within the budgets; None without one.
        margins: its distance to the best trained, uniform and heuristic member within them.
        rank_correlation: Spearman's, of predicted and measured losses of members with unequal layers.
        prediction_error: mean distance of the two, in nats per token.
        last_error: likewise of members of the last round, for which the proxy had been corrected.
        num_evaluated: members measured besides what the proxy needs.
        num_measured: members that were measured now; the others were known.
    """

    found: Sequence[Found]
    best: Found | None
    margins: Sequence[Margin]
    rank_correlation: float | None
    prediction_error: float
    last_error: float
    num_evaluated: int
    num_measured: int

    def trained(self) -> list[Found]:
        """Return the trained members."""
        return [one for one in self.found if one.origin == "trained"]

    def frontier(self, kind: str) -> list[Found]:
        """Return members that none beats in cost and loss."""
        best, kept = float("inf"), []
        for one in sorted(self.found, key=lambda one: (one.costs[kind], one.loss)):
            if one.loss < best:
                best = one.loss
                kept.append(one)
        return kept

    def line(self, kind: str, cost: float) -> float | None:
        """Return the loss at a cost on the lower hull of the trained members; None outside of it."""
        points = _lower_hull(sorted((one.costs[kind], one.loss) for one in self.trained()))
        xs, ys = [x for x, _ in points], [y for _, y in points]
        return float(np.interp(cost, xs, ys)) if points and xs[0] <= cost <= xs[-1] else None


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's rank correlation; None of fewer than three pairs, or of equal numbers.

    >>> spearman([(1.0, 10.0), (2.0, 30.0), (3.0, 20.0)])
    0.5
    """
    if len(pairs) < 3:
        return None
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    if any(one.std() == 0 for one in ranks):
        return None
    return float(round(np.corrcoef(ranks[0], ranks[1])[0, 1], 12))


def mean_distance(pairs: Iterable[tuple[float, float]]) -> float:
    """Return how far two numbers are apart on average."""
    distances = [abs(one - other) for one, other in pairs]
    return sum(distances) / max(1, len(distances))


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Return ranks; equal values share their mean rank."""
    array = np.asarray(values)
    below, equal = (array[:, None] > array).sum(1), (array[:, None] == array).sum(1)
    ranks: NDArray[np.float64] = below + (equal - 1) / 2.0
    return ranks


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no line between two others lies below."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    return hull


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
