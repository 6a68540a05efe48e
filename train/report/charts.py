"""Charts: curves over training, and the family's two panels, loss and acceptance against size.

The dotted lines of the acceptance panel come from theorem 3.8 of https://arxiv.org/abs/2211.17192.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

from models.checkpoint.family import Member
from models.decode.tune.predict import MAX_GAMMA, best_speedup
from train.report.style import INK, Chart, Key, styled

Row: TypeAlias = Mapping[str, Any]

CONTOURS = "speed-up of decoding if time went by parameters alone"
SPEED_UPS = (1.5, 2.0, 3.0)
# A format alone would write 0 as 0M.
COUNT_AXIS = alt.Axis(labelExpr="format(datum.value, '~s')", tickCount=5)
PANEL = {"width": 330, "height": 270}


def curve(
    rows: Sequence[Row], key: Key, *, title: str, points: bool, zero: bool = False, top: float | None = None
) -> alt.LayerChart:
    """Draw lines over training tokens, one for each series.

    Args:
        rows: `tokens`, `value`, `step` and the key's field.
        key: colours and shapes of the series.
        title: name of the value.
        points: mark each measurement; otherwise it shows under the pointer only.
        zero: let the axis of values start there.
        top: upper end of the axis of values; what lies above runs off.
    """
    low = min((row["value"] for row in rows), default=0.0)
    scale = alt.Scale(zero=zero)
    if top is not None and top > low:
        scale = alt.Scale(domain=[0 if zero else low - (top - low) * 0.05, top + (top - low) * 0.05])
    base = _chart(rows).encode(
        x=alt.X("tokens:Q", title="training tokens", axis=COUNT_AXIS),
        y=alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6)),
        color=key.color,
        tooltip=[
            alt.Tooltip(f"{key.field}:N"),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("tokens:Q", format=".3~s"),
            alt.Tooltip("value:Q", title=title, format=".4~g"),
        ],
    )
    line = base.mark_line(clip=True, strokeWidth=2 if points else 1.6)
    dots = base.mark_point(clip=True, filled=True, size=42, opacity=1 if points else 0)
    return alt.LayerChart(layer=[line, dots.encode(shape=key.shape)])


def loss_panel(rows: Sequence[Row], key: Key) -> alt.LayerChart:
    """Draw loss against parameters; a line joins the members that no smaller one beats.

    Args:
        rows: as `family_rows` makes them.
        key: by member for one run, by run for several.
    """
    scale = alt.Scale(zero=False, padding=26)
    x = alt.X("parameters:Q", title="parameters", scale=scale, axis=COUNT_AXIS)
    y = alt.Y("loss:Q", title="validation loss, nats per token", scale=scale, axis=alt.Axis(tickCount=6))
    base = _members([row for row in rows if row["loss"] is not None], x, y)
    frontier = base.transform_filter("datum.frontier").mark_line(strokeWidth=1.5, opacity=0.5)
    color = key.color if key.field == "run" else alt.value(INK)
    return alt.LayerChart(layer=[frontier.encode(color=color), *_points(base, key)])


def alpha_panel(rows: Sequence[Row], key: Key) -> alt.LayerChart:
    """Draw acceptance against cost; dotted lines join drafts that would make decoding equally fast."""
    rows = [row for row in rows if row["alpha"] is not None]
    low = max(0.0, min((row["alpha"] for row in rows), default=0.5) - 0.1)
    x = alt.X(
        "fraction:Q", title="fraction of the full model's parameters", scale=alt.Scale(domain=[0, 1.08])
    )
    y = alt.Y("alpha:Q", title="alpha, expected acceptance", scale=alt.Scale(domain=[low, 1.04]))
    x, y = x.axis(format="%", tickCount=5), y.axis(tickCount=6)
    contours = [point for speed in SPEED_UPS for point in speed_up_contour(speed) if point["alpha"] >= low]
    dotted = _chart(contours).encode(x=x, y=y)
    lines = dotted.mark_line(color=INK, opacity=0.45, strokeWidth=1, strokeDash=[2, 3])
    labels = dotted.transform_filter("datum.end").mark_text(color=INK, opacity=0.7, dy=-9, fontSize=11)
    members = _points(_members(rows, x, y), key)
    drawn = [lines.encode(detail="speed:N"), labels.encode(text="speed:N"), *members]
    return alt.LayerChart(layer=drawn)


def family_chart(members: Sequence[Member]) -> Chart:
    """Draw two panels for a file: loss against parameters, alpha against their fraction."""
    rows = family_rows(members)
    full = next((row["member"] for row in rows if row["granularity"] == "full"), None)
    key = Key("member", tuple(row["member"] for row in rows), full)
    title = alt.Title("How good each member is", subtitle="lower and further left is better")
    panels = [loss_panel(rows, key).properties(title=title, **PANEL)]
    if any(row["alpha"] is not None for row in rows):
        title = alt.Title("How well each member drafts", subtitle=f"dotted: {CONTOURS}")
        panels.append(alpha_panel(rows, key).properties(title=title, **PANEL))
    chart = styled(alt.hconcat(*panels, spacing=36))
    return chart.properties(background="white", padding=16)


def family_rows(members: Sequence[Member], run: str = "") -> list[dict[str, Any]]:
    """Return members as rows of the two panels, by ascending parameters."""
    ordered = sorted(members, key=lambda member: member.parameters)
    rows: list[dict[str, Any]] = []
    best = float("inf")
    for member in ordered:
        frontier = member.loss is not None and member.loss < best
        best = min(best, float("inf") if member.loss is None else member.loss)
        fraction = member.parameters / ordered[-1].parameters
        fields = {name: getattr(member, name) for name in ("granularity", "parameters", "loss", "alpha")}
        names = {"run": run, "member": member.name, "label": member.name}
        rows.append({**names, **fields, "fraction": fraction, "frontier": frontier})
    return rows


@functools.cache
def speed_up_contour(speed: float, num_points: int = 40) -> tuple[dict[str, Any], ...]:
    """Return the alpha that decoding needs at each cost to be `speed` times as fast, up to 1.

    A draft step costs its fraction of a target step, and a target pass on a few tokens what it costs on one.

    >>> points = speed_up_contour(2.0)
    >>> points[0]["alpha"] < points[-1]["alpha"] <= 1.0
    True
    """
    # At alpha = 1 the longest draft is the best: gamma + 1 tokens for gamma steps of it and one pass.
    last = ((MAX_GAMMA + 1) / speed - 1) / MAX_GAMMA
    return tuple(
        {
            "speed": f"{speed:g}×",
            "fraction": last * index / num_points,
            "alpha": _needed_alpha(speed, last * index / num_points),
            "end": index == num_points,
        }
        for index in range(1, num_points + 1)
    )


def _needed_alpha(speed: float, cost: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if best_speedup(middle, cost) < speed else (low, middle)
    return high


def _chart(rows: Sequence[Row]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))


def _members(rows: Sequence[Row], x: alt.X, y: alt.Y) -> alt.Chart:
    run = [alt.Tooltip("run:N")] if any(row["run"] for row in rows) else []
    tooltip = [
        *run,
        alt.Tooltip("member:N"),
        alt.Tooltip("granularity:N"),
        alt.Tooltip("parameters:Q", format=".3~s"),
        alt.Tooltip("loss:Q", format=".3f"),
        alt.Tooltip("alpha:Q", format=".3f"),
    ]
    return _chart(rows).encode(x=x, y=y, tooltip=tooltip)


def _points(base: alt.Chart, key: Key) -> list[alt.Chart]:
    points = base.mark_point(filled=True, size=95, opacity=1).encode(color=key.color, shape=key.shape)
    names = base.mark_text(dy=-13, fontSize=12, color=INK).encode(text="label:N")
    return [points, names]
