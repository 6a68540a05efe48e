"""The end of a run that began from given weights: the full model goes part of the way back to its original.

A long run of small batches moves the shared weights in directions that nobody asked for, against which the
hold of `loss.trust` does little. Weights between the original and the trained ones (WiSE-FT: Wortsman et al.,
2109.01903, section 3) lose little of the full model and keep most of what members learned.
"""

from collections.abc import Mapping

import torch
from rich.console import Console
from torch import Tensor

from models.checkpoint.weights import weights_of
from models.elastic.granularity import FULL
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.consistency import compare_views
from models.measure.perplexity import Batches
from train.recipe.recipe import FULL_NAME, Recipe
from train.run.start import load_start

STEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Fractions that `model.blend=auto` tries: at half of the way members begin to lose."""
MAX_LOSS = 1.005
"""Loss of the full model / its original's that `auto` takes for equal."""


def blend(model: ElasticLM, recipe: Recipe, batches: Batches, console: Console) -> float:
    """Set all weights but the members' own to `original + fraction * (trained - original)`.

    Args:
        model: The trained model; its weights are changed in place.
        recipe: The run's, whose `model.from` names the original and `model.blend` the fraction.
        batches: Held-out tokens and labels, by which `auto` chooses.
        console: Is told the fraction that `auto` chose and what it does to the loss.

    Returns:
        The fraction. 1 if the run holds its full model to no original, began from a part of one, or has no
        text to choose by.
    """
    if not recipe.is_held or recipe.model.train != "joint":
        return 1.0
    original = load_start(recipe)
    if recipe.model.blend != "auto":
        _move(model, weights_of(original), recipe.model.blend)
        return recipe.model.blend
    if not batches:
        return 1.0
    device = model.lm_head.weight.device
    limit = MAX_LOSS * _loss(original.to(device).eval(), batches)
    start = weights_of(original)
    losses: dict[float, float] = {}
    now = 1.0
    for fraction in STEPS:
        _move(model, start, fraction / now)
        now = fraction
        losses[fraction] = _loss(model, batches)
        if losses[fraction] <= limit:
            break
    best = now if losses[now] <= limit else min(losses, key=losses.__getitem__)
    _move(model, start, best / now)
    told = f"; with {best:g} of what changed (model.blend) {losses[best]:.3f}" if best < 1 else ""
    console.print(
        f"full model: loss {losses[1.0]:.3f}, its original {limit / MAX_LOSS:.3f}{told}", highlight=False
    )
    return best


def _loss(model: ElasticLM, batches: Batches) -> float:
    return compare_views(model, {FULL_NAME: View(model, FULL)}, batches)[FULL_NAME]["loss"]


@torch.no_grad()
def _move(model: ElasticLM, start: Mapping[str, Tensor], fraction: float) -> None:
    """Multiply by a fraction what lies between the weights and those of the start."""
    for name, weight in weights_of(model).items():
        weight.copy_(torch.lerp(start[name].to(weight.device, weight.dtype), weight, fraction))
