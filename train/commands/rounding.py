"""How far an extraction whose numbers are rounded is from the member in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from models.base.labels import IGNORE_INDEX
from models.checkpoint.folder import ModelFolder
from models.elastic.view import View
from models.measure.pairing import compare_models

ROW, NUM_TOKENS = 512, 2048
"""Positions of a row, and tokens, of a text on which an extraction is compared."""
PROBE = "its own greedy text"
"""Where no text is given, members are compared on what the member in place writes."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A text on which an extraction is compared."""

    source: str
    text_field: str | None = None

    def batches(self, folder: ModelFolder) -> list[tuple[Tensor, Tensor]]:
        """Return tokens and labels."""
        from train.data.loader import take_batches
        from train.data.tokens import load_rows_for

        rows = load_rows_for(folder, self.source, longest=ROW, text_field=self.text_field)
        return list(take_batches(rows, NUM_TOKENS))


def own_text(ids_BT: Tensor, num_prompt: int) -> list[tuple[Tensor, Tensor]]:
    """Return rows as tokens and labels, of which only what was written after the prompt counts."""
    labels_BT = ids_BT[:, 1:].clone()
    labels_BT[:, : num_prompt - 1] = IGNORE_INDEX
    return [(ids_BT[:, :-1], labels_BT)]


def measure_rounding(
    folder: ModelFolder,
    view: View,
    theirs: View,
    own: list[tuple[Tensor, Tensor]],
    text: HeldOut | None,
) -> dict[str, Any]:
    """Return how far a rounded member is from the one in place.

    Args:
        folder: the family.
        view: the member in place.
        theirs: the rounded one.
        own: tokens and labels that the one in place writes.
        text: a held-out text in place of `own`.

    Returns:
        `kl`, KL(in place, rounded) in nats per token; `alpha`, the chance that a token which the rounded one
        drafts is kept; `match`, how often the likeliest token is the same; standard errors; `num_tokens` of
        `text`.
    """
    batches = own if text is None else text.batches(folder)
    found = compare_models(view, theirs, batches)
    names = {"kl": "kl", "alpha": "sampled", "match": "greedy"}
    return {
        **{name: found[measure].mean for name, measure in names.items()},
        **{f"{name}_error": found[measure].error for name, measure in names.items()},
        "num_tokens": sum(int((labels_BT != IGNORE_INDEX).sum()) for _, labels_BT in batches),
        "text": PROBE if text is None else text.source,
    }


def tell_rounding(rounding: Mapping[str, Any], console: Console) -> None:
    """Say how far it is."""
    console.print(
        f"beside the member in place: KL {rounding['kl']:.2g} +- {rounding['kl_error']:.1g} nats a token, "
        f"alpha {rounding['alpha']:.4f} +- {rounding['alpha_error']:.4f}, "
        f"on {rounding['num_tokens']:,} tokens of {rounding['text']}",
        markup=False,
    )
