"""The frontier that `nestling search --budget` found: every size that was measured, and what extracts it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from models.base.errors import NestlingError
from models.base.numbers import si
from train.report.charts import COUNT_AXIS
from train.report.read import FRONTIER
from train.report.style import INK, Key

ORIGINS = ("trained", "found", "heuristic", "uniform")
KEY = Key("from", ORIGINS, "trained")
CAPTION = (
    "Lower and further left is better. Bars: two standard errors of the distance to the full model. "
    "The line joins trained members. A click copies the command that extracts the member."
)


def frontier_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the members of a search as rows of the chart, by ascending cost.

    Raises:
        NestlingError: if it is not what a search writes.
    """
    try:
        return _rows(found) if found else []
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise NestlingError(
            f"{FRONTIER} is damaged ({error!r}); run nestling search --budget again, or delete the file"
        ) from None


def kind_of(found: Mapping[str, Any]) -> str:
    """Return the kind of the first budget, which is what sizes are counted in."""
    return str(found["budgets"][0]).partition("=")[0]


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    kind, model = kind_of(found), str(found["model"])
    rows = []
    for one in found["members"]:
        cost, error = one["costs"].get(kind), 2 * (one["error"] or 0.0)
        if cost is None or one["loss"] is None or one["from"] not in ORIGINS:
            continue
        rows.append(
            {
                "from": one["from"],
                "member": one["name"] or one["granularity"],
                "granularity": one["granularity"],
                "cost": cost,
                "size": si(cost),
                "loss": one["loss"],
                "low": one["loss"] - error,
                "high": one["loss"] + error,
                "command": command_for(model, one["granularity"], found.get("for")),
            }
        )
    return sorted(rows, key=lambda row: row["cost"])


def command_for(model: str, granularity: str, engine: str | None = None) -> str:
    """Return the line that extracts a member, for the engine that the search was for.

    >>> command_for("checkpoints/a/model", "ffn=0.5")
    'nestling extract checkpoints/a/model --granularity ffn=0.5 --out member'
    >>> command_for("a model", "ffn=0.5", "llama.cpp")
    "nestling extract 'a model' --granularity ffn=0.5 --format gguf --out member.gguf"
    """
    out = "--format gguf --out member.gguf" if engine == "llama.cpp" else "--out member"
    return f"nestling extract {shlex.quote(model)} --granularity {shlex.quote(granularity)} {out}"


def frontier_chart(rows: Sequence[Mapping[str, Any]], kind: str) -> alt.LayerChart:
    """Draw loss against cost, with error bars; page.js copies a point's command when it is clicked."""
    scale = alt.Scale(zero=False, padding=20)
    data = alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
    x = alt.X("cost:Q", title=kind, scale=scale, axis=COUNT_AXIS)
    y = alt.Y("loss:Q", title="loss, nats per token", scale=scale, axis=alt.Axis(tickCount=6))
    base = data.encode(
        x=x,
        y=y,
        tooltip=[
            alt.Tooltip("member:N"),
            alt.Tooltip("granularity:N"),
            alt.Tooltip("from:N"),
            alt.Tooltip("size:N", title=kind),
            alt.Tooltip("loss:Q", format=".4f"),
            alt.Tooltip("command:N", title="click to copy"),
        ],
    )
    trained = base.transform_filter("datum.from == 'trained'")
    line = trained.mark_line(color=INK, opacity=0.4, strokeWidth=1.5)
    bars = base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", title=None), y2="high:Q", color=KEY.color)
    points = base.mark_point(filled=True, size=70, opacity=0.95, cursor="pointer").encode(
        color=KEY.color, shape=KEY.shape
    )
    return alt.LayerChart(layer=[line, bars, points])


def keep_frontier(model: Path, fields: Mapping[str, Any]) -> Path | None:
    """Keep what a search found beside the run whose model it is; return the file, or None without a run."""
    from models.base.files import write_json

    run = model.resolve().parent
    if not (run / "metrics.jsonl").is_file():
        return None
    write_json(run / FRONTIER, fields)
    return run / FRONTIER
