"""The look of charts, on the page and in SVG files alike.

Text, axes and the full model are drawn in `currentColor`, so that a chart takes the colours of the page
around it, light or dark. The other colours keep a contrast of 3 on both, and stay apart for eyes that do not
see red, green or blue; the shape of a point says the same once more.
"""

import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import altair as alt

from models.base.files import write_bytes
from train.report.write import write_text

Chart: TypeAlias = alt.LayerChart | alt.HConcatChart | alt.VConcatChart

INK = "currentColor"
COLORS = ("#1f6fc4", "#d55e00", "#0b9c74", "#b0478f", "#8f86f0", "#7f8c00")
SHAPES = ("square", "triangle-up", "diamond", "cross", "triangle-down", "stroke")
FULL_SHAPE = "circle"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
SVG_STYLE = (
    "<style>svg{color:#1c2024}svg>rect{fill:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e4e7ea}svg>rect{fill:#14171c}}</style>"
)


@dataclass(frozen=True)
class Key:
    """Colours and shapes of series: `field` of a row names its series, `full` is drawn in ink."""

    field: str
    names: tuple[str, ...]
    full: str | None = None

    def look(self, name: str) -> tuple[str, str]:
        """Return colour and shape of one series.

        >>> Key("member", ("XL", "S", "M"), full="XL").look("M")
        ('#d55e00', 'triangle-up')
        """
        if name == self.full:
            return INK, FULL_SHAPE
        place = [other for other in self.names if other != self.full].index(name)
        return COLORS[place % len(COLORS)], SHAPES[place % len(SHAPES)]

    @property
    def color(self) -> alt.Color:
        """Return the colour channel; the legend stands outside of the charts, once."""
        scale = alt.Scale(domain=list(self.names), range=[self.look(name)[0] for name in self.names])
        return alt.Color(f"{self.field}:N", scale=scale, legend=None)

    @property
    def shape(self) -> alt.Shape:
        """Return the shape channel."""
        scale = alt.Scale(domain=list(self.names), range=[self.look(name)[1] for name in self.names])
        return alt.Shape(f"{self.field}:N", scale=scale, legend=None)


def styled(chart: Chart) -> Chart:
    """Return the chart in the house style: quiet axes, colours of the surrounding text."""
    axis = alt.AxisConfig(
        labelColor=INK,
        labelOpacity=0.75,
        labelFontSize=12,
        labelPadding=6,
        titleColor=INK,
        titleOpacity=0.9,
        titleFontSize=12,
        titleFontWeight="normal",
        titlePadding=10,
        domainColor=INK,
        domainOpacity=0.35,
        tickColor=INK,
        tickOpacity=0.35,
        gridColor=INK,
        gridOpacity=0.1,
    )
    title = alt.TitleConfig(
        color=INK,
        fontSize=14,
        fontWeight=600,
        anchor="start",
        offset=12,
        subtitleColor=INK,
        subtitlePadding=4,
    )
    view = alt.ViewConfig(stroke=None)
    chosen: Chart = chart.configure(font=FONT, background="transparent", axis=axis, title=title, view=view)
    return chosen


def to_svg(chart: Chart) -> str:
    """Return the chart as SVG text, the same each time, which follows the reader's light or dark theme."""
    stream = io.StringIO()
    chart.save(stream, format="svg")
    # Vega numbers clipping paths on through all charts of a process.
    text = re.sub(r"clip\d+", _renumber(), stream.getvalue())
    opening, rest = text.split(">", 1)
    return f"{opening}>{SVG_STYLE}<!-- chart {digest(chart)} -->{rest}\n"


def save_svg(chart: Chart, path: Path) -> None:
    """Write the chart to an SVG file, whole or not at all."""
    write_text(path, to_svg(chart))


def save_chart(chart: Chart, path: Path) -> None:
    """Write the chart, whole or not at all, as .svg, .png or .html (a page that needs no network)."""
    if path.suffix == ".svg":
        save_svg(chart, path)
    elif path.suffix == ".html":
        write_text(path, chart.to_html(inline=True, embed_options={"renderer": "svg", "actions": False}))
    else:
        image = io.BytesIO()
        chart.save(image, format="png", scale_factor=2)
        write_bytes(path, image.getvalue())


def digest(chart: Chart) -> str:
    """Hash what the chart shows, not the drawing: letters differ in width between machines."""
    spec = {name: part for name, part in chart.to_dict().items() if name != "$schema"}
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def _renumber() -> Callable[[re.Match[str]], str]:
    seen: dict[str, int] = {}
    return lambda found: f"clip{seen.setdefault(found[0], len(seen))}"
