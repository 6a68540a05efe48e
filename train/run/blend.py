"""The end of a run that began from given weights: the full model goes part of the way back to its original.

A long run of small batches moves the shared weights in directions that nobody asked for, against which the
hold of `loss.trust` does little. Weights between the original and the trained ones (WiSE-FT: Wortsman et al.,
2109.01903, section 3) lose little of the full model and keep most of what members learned.
"""

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor

from models.checkpoint.weights import weights_of
from models.elastic.granularity import FULL
from models.elastic.model import ElasticLM
from models.measure.token_losses import TokenLosses
from train.recipe.recipe import Recipe
from train.run.start import load_start

STEP, LEAST = 0.1, 0.5
"""Step and end of the way back that `model.blend=auto` goes: at half of it members begin to lose."""
MAX_LOSS = 1.005
"""Loss of the full model / its original's that `auto` takes for equal."""


def blend(
    model: ElasticLM, recipe: Recipe, batches: Sequence[tuple[Tensor, Tensor]], console: Console
) -> float:
    """Set all weights but the members' own to `original + fraction * (trained - original)`.

    Args:
        model: The trained model; its weights are changed in place.
        recipe: The run's, whose `model.from` names the original and `model.blend` the fraction.
        batches: Held-out tokens and labels, by which `auto` chooses.
        console: Is told the fraction that `auto` chose and what it does to the loss.

    Returns:
        The fraction. 1 if the run holds its full model to no original, or `auto` has no text to choose by.
    """
    fraction = recipe.model.blend
    if not recipe.is_held or recipe.model.train != "joint" or fraction == 1:
        return 1.0
    if fraction != "auto":
        _move(model, weights_of(load_start(recipe)), fraction)
        return fraction
    if not batches:
        return 1.0
    original = load_start(recipe).to(model.device).eval()
    limit, start = MAX_LOSS * _loss(original, batches), weights_of(original)
    losses, now = {1.0: _loss(model, batches)}, 1.0
    while losses[now] > limit and now > LEAST:
        less = round(now - STEP, 1)
        _move(model, start, less / now)
        now = less
        losses[now] = _loss(model, batches)
    best = now if losses[now] <= limit else min(losses, key=losses.__getitem__)
    _move(model, start, best / now)
    told = f"; with {best:g} of what changed (model.blend) {losses[best]:.3f}" if best < 1 else ""
    console.print(
        f"full model: loss {losses[1.0]:.3f}, its original {limit / MAX_LOSS:.3f}{told}", highlight=False
    )
    return best


def _loss(model: ElasticLM, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    return TokenLosses(model, batches).mean(FULL)


@torch.no_grad()
def _move(model: ElasticLM, start: Mapping[str, Tensor], fraction: float) -> None:
    """Multiply by a fraction what lies between the weights and those of the start."""
    for name, weight in weights_of(model).items():
        weight.copy_(torch.lerp(start[name].to(weight.device, weight.dtype), weight, fraction))
