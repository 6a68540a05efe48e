"""The charts of the page: coloured by member for one run; for several, a panel a member, by run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import altair as alt

from train.report.charts import alpha_panel, curve, family_rows, loss_panel
from train.report.frontier import CAPTION, frontier_chart, frontier_rows, kind_of
from train.report.read import Run
from train.report.style import Key
from train.run.metrics import Line

# More points than a panel has room for only make the page heavy.
MAX_POINTS = 240
# The first steps fall from the loss of a uniform guess: shown whole they would flatten all the rest.
START = 0.1

LOSS = "Lower and further left is better. The line joins the members that no smaller one beats."
ALPHA = (
    "Higher and further left drafts better. Dotted: decoding as many times as fast as plain, "
    "if time went by parameters alone and checking several tokens cost as much as one."
)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows, and how to read it."""

    title: str
    caption: str
    chart: alt.LayerChart


def make_key(runs: Sequence[Run]) -> Key:
    """Return colours by member for one run, by run for several."""
    if len(runs) > 1:
        return Key("run", tuple(run.name for run in runs))
    (run,) = runs
    return Key("member", tuple(sorted(run.member_names, key=lambda name: name != run.full)), run.full)


def family_figures(runs: Sequence[Run], key: Key) -> list[Figure]:
    """Draw loss and acceptance of each measured member against its size."""
    rows = [row for run in runs for row in family_rows(run.members, run.name)]
    panels = (
        ("loss", "Loss against parameters", LOSS, loss_panel),
        ("alpha", "Acceptance against cost", ALPHA, alpha_panel),
    )
    return [
        Figure(title, caption, panel(_labelled(measured, measure), key))
        for measure, title, caption, panel in panels
        if (measured := [row for row in rows if row[measure] is not None])
    ]


def frontier_figures(run: Run) -> list[Figure]:
    """Draw every size that a search under a budget measured."""
    rows = frontier_rows(run.frontier)
    if not rows:
        return []
    kind = kind_of(run.frontier)
    return [Figure(f"Loss against {kind}", CAPTION, frontier_chart(rows, kind))]


def loss_figures(runs: Sequence[Run], key: Key) -> list[Figure]:
    """Draw validation loss and the training objective over the run."""
    caption = "Nats per token on held-out text. The first tenth may run off the top."
    validation = _by_member(runs, key, "valid/{}/loss", "Validation loss", caption, everyone=True)
    trained = [rows for run in runs for rows in _objective(run, full_only=len(runs) > 1)]
    whose = " of the full model" if len(runs) > 1 else ""
    objective = _figure(
        f"Training objective{whose}",
        "The optimizer's loss, averaged over neighbouring steps. A distilled member's objective is a "
        "divergence, not a cross-entropy: compare members on validation text.",
        trained,
        key,
        points=False,
    )
    return [*validation, *objective]


def consistency_figures(runs: Sequence[Run], key: Key) -> list[Figure]:
    """Draw over the run how close each smaller member is to the full model."""
    alpha = "The chance that one token drafted by this member is kept. The full model's is 1."
    match = "How often the member's greedy token is the full model's, in percent of positions."
    speedup = (
        "Speed-up of decoding with this draft, at the best number of tokens a round, if time went by "
        "operations alone and checking several tokens cost as much as one."
    )
    return [
        *_by_member(runs, key, "valid/{}/alpha", "Alpha", alpha),
        *_by_member(runs, key, "valid/{}/match", "Greedy match", match),
        *_by_member(runs, key, "valid/{}/speedup", "Predicted speed-up", speedup),
    ]


def gradient_figures(runs: Sequence[Run], key: Key) -> list[Figure]:
    """Draw how strongly each member pulls at the weights, and how far in the full model's direction."""
    norm = "Norm for each member's own loss, a mean over the same few rows of held-out text."
    cosine = (
        "Cosine of the member's gradient and the full model's on the weights that both have: "
        "above 0 they help each other, below 0 they pull apart."
    )
    return [
        *_by_member(runs, key, "gradient/{}/norm", "Gradient norm by member", norm, everyone=True),
        *_by_member(runs, key, "gradient/{}/cosine", "Cosine with the full model's gradient", cosine),
    ]


def machine_figures(runs: Sequence[Run], key: Key) -> list[Figure]:
    """Draw the run's own health; for one run, a single line in the colour of text."""
    key = key if len(runs) > 1 else Key("run", (runs[0].name,), full=runs[0].name)
    shown = {
        "tokens_per_second": ("Tokens per second", "Training throughput, validation left out."),
        "mfu": (
            "Utilisation",
            "Fraction of the rate that a large product was measured at here.",
        ),
        "data_wait": ("Data wait", "The fraction of the time spent waiting for data; near 0 is good."),
        "gradient_norm": ("Gradient norm", "Before clipping. Spikes that stay are a warning."),
        "lr": ("Learning rate", "As scheduled."),
    }
    figures = []
    for name, (title, caption) in shown.items():
        series = [_rows(run, run.train, name, "") for run in runs]
        figures += _figure(title, caption, series, key, points=False, clip=name == "gradient_norm", zero=True)
    return figures


def _labelled(rows: Rows, measure: str) -> Rows:
    """Label each member once, at its highest point: labels of several runs would overlap."""
    highest = {row["member"]: row for row in sorted(rows, key=lambda row: float(row[measure]))}
    return [{**row, "label": row["member"] if row is highest[row["member"]] else ""} for row in rows]


def _by_member(
    runs: Sequence[Run], key: Key, pattern: str, title: str, caption: str, *, everyone: bool = False
) -> list[Figure]:
    """Draw one figure with a line for each member, or for several runs a figure for each member."""
    series = [
        _rows(run, [*run.valid, *run.gradients], pattern.format(name), name)
        for run in runs
        for name in run.member_names
        if everyone or name != run.full
    ]
    if len(runs) == 1:
        return _figure(title, caption, series, key, points=True)
    figures: list[Figure] = []
    for name in dict.fromkeys(rows[0]["member"] for rows in series if rows):
        chosen = [rows for rows in series if rows and rows[0]["member"] == name]
        figures += _figure(f"{title}: {name}", caption if not figures else "", chosen, key, points=True)
    return figures


def _figure(
    title: str,
    caption: str,
    series: Sequence[Rows],
    key: Key,
    *,
    points: bool,
    clip: bool = True,
    zero: bool = False,
) -> list[Figure]:
    rows = list(chain.from_iterable(series))
    if not rows:
        return []
    name, top = title.partition(":")[0].lower(), _top(rows) if clip else None
    chart = curve(rows, key, title=name, points=points, zero=zero, top=top)
    return [Figure(title, caption, chart)]


def _objective(run: Run, *, full_only: bool) -> list[Rows]:
    names = [name for name in run.member_names if not full_only or name == run.full]
    return [_rows(run, run.train, f"loss/{name}", name) for name in names]


def _rows(run: Run, lines: Iterable[Line], field: str, member: str) -> Rows:
    """Return the finite values of a field, neighbours averaged where there are too many."""
    found = [
        {
            "run": run.name,
            "member": member,
            "step": line["step"],
            "tokens": line["tokens"],
            "value": line[field],
        }
        for line in lines
        if isinstance(line.get(field), int | float) and math.isfinite(line[field])
    ]
    size = math.ceil(len(found) / MAX_POINTS)
    return [_average(found[start : start + size]) for start in range(0, len(found), size or 1)]


def _average(rows: Rows) -> dict[str, Any]:
    return {**rows[-1], "value": sum(row["value"] for row in rows) / len(rows)}


def _top(rows: Rows) -> float | None:
    """Return the highest value after the start; None where the start is no higher."""
    late = max(row["tokens"] for row in rows) * START
    top: float = max(row["value"] for row in rows if row["tokens"] >= late)
    return top if any(row["value"] > top for row in rows) else None
