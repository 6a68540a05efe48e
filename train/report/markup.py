"""Small pieces of HTML. Whatever comes from a run is escaped here."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.report.figures import Figure
from train.report.samples import Comparison
from train.report.style import Key, styled

GLYPHS = {
    "circle": '<circle cx="7" cy="7" r="4.5"/>',
    "square": '<rect x="3" y="3" width="8" height="8"/>',
    "triangle-up": '<path d="M7 2 12 11H2Z"/>',
    "diamond": '<path d="M7 1.5 12 7 7 12.5 2 7Z"/>',
    "cross": '<path d="M5 2h4v3h3v4H9v3H5V9H2V5h3Z"/>',
    "triangle-down": '<path d="M7 12 12 3H2Z"/>',
    "stroke": '<rect x="2" y="5.5" width="10" height="3"/>',
}


def section(title: str, *parts: str, lead: str = "") -> str:
    """Return a section with a heading, or nothing at all if it has no content."""
    body = "".join(parts)
    if not body:
        return ""
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{body}</section>\n"


def grid(charts: Sequence[Figure], key: Key | None = None) -> str:
    """Return a grid of figures below the legend that they share."""
    if not charts:
        return ""
    return (legend(key) if key else "") + f'<div class="grid">{"".join(map(figure, charts))}</div>'


def figure(drawn: Figure) -> str:
    """Return one figure: the chart's JSON waits in the page until page.js draws it."""
    spec = styled(drawn.chart.properties(width="container", height=250)).to_dict()
    caption = f"<figcaption>{escape(drawn.caption)}</figcaption>" if drawn.caption else ""
    return (
        f"<figure><h3>{escape(drawn.title)}</h3>{caption}"
        f'<div class="chart" role="img" aria-label="{escape(drawn.title)}"></div>'
        f'<script type="application/json">{embedded(spec)}</script></figure>'
    )


def legend(key: Key) -> str:
    """Say what each colour and shape stands for."""
    entries = []
    for name in key.names:
        color, shape = key.look(name)
        glyph = f'<svg viewBox="0 0 14 14" fill="{color}" aria-hidden="true">{GLYPHS[shape]}</svg>'
        note = " <small>full model</small>" if name == key.full else ""
        entries.append(f"<li>{glyph}{escape(name)}{note}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def facts(values: Mapping[str, str]) -> str:
    """Return the few figures that a reader looks for first."""
    tiles = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="facts">{"".join(tiles)}</dl>'


def sample(member: str, comparison: Comparison, full: bool) -> str:
    """Return one member's text; what the full model does not say is marked."""
    note = "full model" if full else f"{comparison.same:.0%} the same"
    text = "".join(
        escape(piece) if same else f"<mark>{escape(piece)}</mark>" for piece, same in comparison.pieces
    )
    return (
        f"<article><header><b>{escape(member)}</b> <small>{note}</small></header><pre>{text}</pre></article>"
    )


def details(title: str, body: str) -> str:
    """Return a part that opens on demand."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def embedded(value: Any) -> str:
    r"""Return JSON that may stand inside a script element.

    >>> embedded({"prompt": "</script>"})
    '{"prompt": "\\u003c/script>"}'
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
