"""Results of a search under a budget: a table, the fields of docs/json.md, and a few sentences."""

from collections.abc import Iterator
from typing import Any

from models.base.numbers import NOTHING
from models.base.table import Table
from models.elastic.granularity import FULL
from train.search.budgets import show_cost
from train.search.found import Found, Result

LEGEND = (
    "predicted: before it was measured; loss: measured, nats per token; +-: standard error of its distance\n"
    "to the full model's; to line: above the lower hull of the trained members"
)
RUNNERS_UP = 3
ORIGINS = {"trained": "trained one", "uniform": "uniform one", "heuristic": "one of the paper's heuristic"}


def member_table(result: Result, kind: str) -> Table:
    """Return the frontier, the trained members and the best of the heuristic's, the cheapest first."""
    frontier = result.frontier(kind)
    shown = [one for one in result.found if one in frontier or one.name or one.origin == "heuristic"]
    full = next(one.costs[kind] for one in result.found if one.member == FULL)
    header = ("member", "from", kind, "of full", "predicted", "loss", "+-", "to line")
    return Table(header, tuple(_row(result, one, kind, full) for one in shown), num_labels=2)


def describe(result: Result) -> Iterator[str]:
    """Say how well the proxy ranks, which member was chosen, and how far others are behind."""
    if result.rank_correlation is not None:
        yield (
            f"predicted and measured losses: rank correlation {result.rank_correlation:.3f} (Spearman), "
            f"{result.prediction_error:.4f} nats apart on average, in the last round {result.last_error:.4f}"
        )
    if result.best is None:
        return
    yield f"chosen: {result.best.member}, loss {result.best.loss:.4f}, {_costs(result.best)}"
    for margin in result.margins:
        other, difference = margin.other, margin.difference
        apart = f"{difference.mean:+.4f} +- {difference.error:.4f} nats"
        yield f"  {apart} beside the best {ORIGINS[other.origin]}, {other.name or other.member}"
    for one in runners_up(result):
        yield f"  then {one.member} ({one.origin}), loss {one.loss:.4f}, {_costs(one)}"


def runners_up(result: Result) -> list[Found]:
    """Return the next best members within the budgets."""
    fitting = sorted((one for one in result.found if one.fits), key=lambda one: one.loss)
    return [one for one in fitting if one is not result.best][:RUNNERS_UP]


def member_fields(one: Found) -> dict[str, Any]:
    """Return a measured member, for JSON."""
    return {
        "name": one.name,
        "granularity": str(one.member),
        "from": one.origin,
        "costs": dict(one.costs),
        "predicted": one.predicted,
        "loss": one.loss,
        "above_full": one.above,
        "error": one.error,
        "fits": one.fits,
    }


def search_fields(result: Result, kind: str) -> dict[str, Any]:
    """Return what was found, for JSON."""
    return {
        "best": None if result.best is None else member_fields(result.best),
        "runners_up": [member_fields(one) for one in runners_up(result)] if result.best else [],
        "margins": [
            {**member_fields(one.other), "difference": one.difference.mean, "error": one.difference.error}
            for one in result.margins
        ],
        "frontier": [str(one.member) for one in result.frontier(kind)],
        "members": [member_fields(one) for one in result.found],
        "rank_correlation": result.rank_correlation,
        "prediction_error": result.prediction_error,
        "last_prediction_error": result.last_error,
        "num_evaluated": result.num_evaluated,
        "num_measured": result.num_measured,
    }


def _costs(one: Found) -> str:
    return ", ".join(f"{kind} {show_cost(kind, cost)}" for kind, cost in one.costs.items())


def _row(result: Result, one: Found, kind: str, full: float) -> tuple[str, ...]:
    line = result.line(kind, one.costs[kind])
    chosen = " (chosen)" if one is result.best else ""
    return (
        f"{one.name}: {one.member}" if one.name else str(one.member),
        one.origin + chosen,
        show_cost(kind, one.costs[kind]),
        f"{one.costs[kind] / full:.1%}",
        NOTHING if one.predicted is None else f"{one.predicted:.4f}",
        f"{one.loss:.4f}",
        f"{one.error:.4f}",
        NOTHING if line is None else f"{one.loss - line:+.4f}",
    )
