"""The picture of a bench: tokens per second of each way to decode, a panel for each temperature and dtype."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from train.report.style import COLORS, INK, Chart, styled
from train.report.tables import way

WIDTH, BAR = 460, 22
ENGINES = {"nestling": COLORS[0], "transformers": COLORS[1], "llama.cpp": COLORS[2]}


def speed_chart(rows: Sequence[Mapping[str, Any]], title: str) -> Chart:
    """Draw bars of tokens per second, whiskers from the slowest to the fastest round.

    Args:
        rows: of `nestling bench`, as its JSON has them.
        title: names what was decoded.
    """
    kinds = list(dict.fromkeys((row["temperature"], row["dtype"]) for row in rows))
    most = max(row["tokens_per_second_range"][1] for row in rows)
    panels = [
        _panel([row for row in rows if (row["temperature"], row["dtype"]) == kind], kind, most)
        for kind in kinds
    ]
    head = alt.Title(title, subtitle="tokens per second, prefill included: median and range over rounds")
    chart = styled(alt.vconcat(*panels, spacing=28).properties(title=head))
    return chart.properties(background="white", padding=16)


def _panel(rows: Sequence[Mapping[str, Any]], kind: tuple[float, str], most: float) -> alt.LayerChart:
    temperature, dtype = kind
    bars = [_bar(row) for row in rows]
    x = alt.X("speed:Q", title=None, scale=alt.Scale(domain=[0, most * 1.2]), axis=alt.Axis(tickCount=6))
    y = alt.Y("way:N", title=None, sort=None, axis=alt.Axis(labelLimit=320))
    color = alt.Color(
        "engine:N",
        scale=alt.Scale(domain=list(ENGINES), range=list(ENGINES.values())),
        legend=None,
    )
    base = alt.Chart(alt.InlineData(values=bars)).encode(y=y)
    tooltip = [
        "engine:N",
        "way:N",
        alt.Tooltip("speed:Q", format=".1f"),
        alt.Tooltip("times:Q", format=".2f"),
    ]
    layers = [
        base.mark_bar(height={"band": 0.72}).encode(x=x, color=color, tooltip=tooltip),
        base.mark_rule(color=INK, strokeWidth=1.2).encode(x=alt.X("least:Q", title=None), x2="most:Q"),
        base.mark_text(align="left", dx=6, color=INK, fontSize=11).encode(
            x=alt.X("most:Q", title=None), text="label:N"
        ),
    ]
    heading = alt.Title(f"temperature {temperature:g}, {dtype}")
    return alt.LayerChart(layer=layers).properties(title=heading, width=WIDTH, height=BAR * len(bars))


def _bar(row: Mapping[str, Any]) -> dict[str, Any]:
    least, most = row["tokens_per_second_range"]
    return {
        "engine": row["engine"],
        "way": way(row),
        "speed": row["tokens_per_second"],
        "least": least,
        "most": most,
        "times": row["speedup"],
        "label": f"{row['tokens_per_second']:.0f} ({row['speedup']:.2f}×)",
    }
