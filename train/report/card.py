"""The model card of an extraction: README.md with the head that Hugging Face reads, and a picture.

The picture is drawn without a library: a card is written at every extraction.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.base.numbers import fixed, percent, si
from models.base.table import Columns, Table
from models.checkpoint.family import Member

CARD, PICTURE = "README.md", "frontier.svg"
_WIDTH, _HEIGHT, _EDGE = 560, 320, 56
_COLUMNS: Columns = {
    "name": ("member", str),
    "granularity": ("granularity", str),
    "parameters": ("parameters", si),
    "loss": ("loss", fixed(4)),
    "alpha": ("alpha", fixed(3)),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is about.

    Args:
        title: name of the folder.
        granularity: the member's text.
        form: stock, ragged or padded.
        dtype: int8 or int4, if matrices are packed.
        parameters: numbers in the folder.
        full_parameters: those of the full model.
        loss: nats per token, if it was measured.
        alpha: expected acceptance of a token that it drafts for the full model, if it was measured.
        members: the family, as it was measured when it was trained.
        others: (parameters, loss) of further members that a search measured.
        budget: what was asked of the search, if there was one.
        provenance: where the family comes from.
    """

    title: str
    granularity: str
    form: str
    dtype: str | None = None
    parameters: int
    full_parameters: int
    loss: float | None
    alpha: float | None
    members: Sequence[Member]
    others: Sequence[tuple[float, float]] = ()
    budget: str | None = None
    provenance: Mapping[str, Any]


def model_card(subject: Subject) -> str:
    """Return the text of README.md."""
    trust = ", trust_remote_code=True" if subject.form == "ragged" else ""
    budget = "" if subject.budget is None else f" It loses least within `{subject.budget}`."
    loss = "" if subject.loss is None else f" Loss: {subject.loss:.4f} nats per token."
    alpha = (
        ""
        if subject.alpha is None
        else f" Of a token that it drafts for the full model, {percent(subject.alpha)} are accepted."
    )
    said = (
        f"The member `{subject.granularity}` of a nested family: {si(subject.parameters)} of "
        f"{si(subject.full_parameters)} parameters, cut out by nestling ({_FORMS[subject.form]})."
    )
    if subject.dtype is not None:
        said += (
            f" Its matrices are in {subject.dtype}, as compressed-tensors (`pip install compressed-tensors`)."
        )
    place = json.dumps(subject.title, ensure_ascii=False)  # a title may have quotes
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [nestling, matformer, text-generation]",
        "---",
        f"# {subject.title}",
        "",
        said + budget + loss + alpha,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({place}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        "```",
        "",
        "What was proved when it was written is in `receipt.json`; `nestling verify` on it repeats that.",
        "",
    ]
    if _points(subject):
        lines += [f"![Loss against parameters]({PICTURE})", ""]
    if rows := [vars(member) for member in subject.members]:
        lines += [
            "## The family",
            "",
            Table.of(rows, _COLUMNS, labels=["name", "granularity"]).to_markdown(),
            "",
        ]
    if origin := [f"- {name}: `{value}`" for name, value in _origin(subject.provenance)]:
        lines += ["## Provenance", "", *origin]
    return "\n".join(lines) + "\n"


_FORMS = {
    "stock": "a stock architecture",
    "ragged": "unequal layers in their true shapes, built by `modeling_nestling.py`",
    "padded": "unequal layers, filled up with zeros to a stock architecture",
}


def picture(subject: Subject) -> str | None:
    """Return an SVG of loss against parameters, this member marked; None if too little was measured."""
    points = _points(subject)
    if not points:
        return None
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    middle = _HEIGHT / 2
    parts = [
        _HEAD.format(width=_WIDTH, height=_HEIGHT),
        _LABEL.format(
            x=_WIDTH / 2, y=_HEIGHT - 12, text=f"parameters, {si(min(xs))} to {si(max(xs))}", turn=0
        ),
        _LABEL.format(x=14, y=middle, text=f"loss, {min(ys):.3f} to {max(ys):.3f}", turn=-90),
    ]
    for x, y, name in points:
        left = _EDGE + (_WIDTH - 2 * _EDGE) * _place(x, xs)
        top = _EDGE / 2 + (_HEIGHT - 1.5 * _EDGE) * (1 - _place(y, ys))
        color, size = {"": ("#9aa5b1", 3), THIS: ("#d1495b", 7)}.get(name, ("#30638e", 5))
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="{size}" fill="{color}"/>')
        parts.append(f'<text x="{left + 9:.1f}" y="{top - 6:.1f}">{name}</text>' if name else "")
    return "".join(parts) + "</svg>\n"


THIS = "this one"
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    'font-size="12"><rect width="100%" height="100%" fill="white"/>'
)
_LABEL = '<text x="{x}" y="{y}" transform="rotate({turn} {x} {y})" text-anchor="middle">{text}</text>'


def _points(subject: Subject) -> list[tuple[float, float, str]]:
    """Return parameters, loss and name of what was measured; this member last."""
    if subject.loss is None:
        return []
    found = [(x, y, "") for x, y in subject.others]
    found += [
        (one.parameters, one.loss, one.name)
        for one in subject.members
        if one.loss is not None and one.granularity != subject.granularity
    ]
    return [*found, (subject.parameters, subject.loss, THIS)] if found else []


def _place(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return 0.5 if high == low else (value - low) / (high - low)


def _origin(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data, card = (provenance.get(name) or {} for name in ("data", "card"))
    known = {
        "trained on": data.get("source") if isinstance(data, Mapping) else None,
        "training steps": provenance.get("steps"),
        "commit": card.get("commit") if isinstance(card, Mapping) else None,
        "gguf": provenance.get("gguf"),
    }
    return [(name, value) for name, value in known.items() if value is not None]
