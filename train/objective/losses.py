"""A member's loss: cross-entropy that ramps to a divergence from its teacher, the full model.

One value per token, in fp32 and in nats, without a reduction: the caller sums and divides once by the
global number of valid tokens, so that the gradient is the same under any accumulation.

Legend: N tokens, V vocabulary.
"""

from collections.abc import Callable

from torch import Tensor

from models.base.labels import IGNORE_INDEX
from models.elastic import ops
from train.objective.divergences import DIVERGENCES, SETTINGS, alpha, greedy_match
from train.recipe.sections import LossConfig

__all__ = [
    "DIVERGENCES",
    "alpha",
    "cross_entropy",
    "divergence",
    "fade",
    "greedy_match",
    "held_config",
    "hidden_loss",
    "hidden_weight",
    "member_loss",
    "ramp",
    "taught_loss",
]


def member_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    target_logits_NV: Tensor,
    config: LossConfig,
    step: int,
    text_N: Tensor | None = None,
) -> Tensor:
    """Return the loss of a member, whose teacher is the full model; see `taught_loss`.

    Args:
        logits_NV: the member's.
        labels_N: next tokens.
        target_logits_NV: the full model's, detached by the caller.
        config: the recipe's `loss` section.
        step: the absolute optimizer step, from 0.
        text_N: see `taught_loss`.
    """
    return taught_loss(
        logits_NV, labels_N, lambda: divergence(target_logits_NV, logits_NV, config), config, step, text_N
    )


def taught_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    from_teacher: Callable[[], Tensor],
    config: LossConfig,
    step: int,
    text_N: Tensor | None = None,
) -> Tensor:
    """Return the loss of a model that has a teacher: cross-entropy that ramps to the divergence.

    `(1 - r) * cross_entropy + r * weight * divergence`, with `r = ramp(step, config)`; of the cross-entropy
    the fraction `text_weight` stays. Distillation from the first step on would drag the weights that the
    full model shares. A part of weight 0 is not computed.

    Args:
        logits_NV: the student's.
        labels_N: next tokens; `IGNORE_INDEX` gives 0, for the divergence too.
        from_teacher: gives the divergence [N] from the teacher.
        config: the recipe's `loss` section.
        step: the absolute optimizer step, from 0.
        text_N: labels of cross-entropy, where they are others; a row that a model wrote has none.
    """
    ramped = ramp(step, config)
    text_weight = 1 - ramped + ramped * config.text_weight
    loss_N = logits_NV.new_zeros(len(labels_N), dtype=ops.at_least_fp32(logits_NV.dtype))
    if text_weight > 0:
        loss_N = loss_N + text_weight * cross_entropy(logits_NV, labels_N if text_N is None else text_N)
    if ramped > 0:
        loss_N = loss_N + ramped * config.weight * from_teacher()
    return loss_N.masked_fill(labels_N == IGNORE_INDEX, 0.0)


def held_config(trust: float) -> LossConfig:
    """Return the loss of a full model that is held to its frozen original by KL, from the first step on.

    Args:
        trust: the KL's part of the loss; the rest is cross-entropy.
    """
    return LossConfig(
        divergence="forward_kl", weight=trust, text_weight=1 - trust, ramp_start=0, ramp_steps=0
    )


def ramp(step: int, config: LossConfig) -> float:
    """Return the divergence's part of the loss at a step: 0 up to `ramp_start`, 1 from `ramp_steps` later on.

    It is always 0 for a member that learns from the text alone.

    >>> [ramp(step, LossConfig(ramp_start=10, ramp_steps=4)) for step in (0, 10, 11, 14, 99)]
    [0.0, 0.0, 0.25, 1.0, 1.0]
    >>> [ramp(step, LossConfig(ramp_start=10, ramp_steps=0)) for step in (9, 10)]
    [0.0, 1.0]
    """
    if config.divergence == "cross_entropy":
        return 0.0
    if config.ramp_steps == 0:
        return float(step >= config.ramp_start)
    return min(1.0, max(0.0, (step - config.ramp_start) / config.ramp_steps))


def hidden_weight(step: int, config: LossConfig, num_steps: int) -> float:
    """Return the weight of the difference between hidden states at a step of `num_steps`.

    It comes with the divergence and falls to 0 towards the end: at first hidden states say more than logits
    about what a layer should do, later a small member has better uses for its width than to repeat them.

    >>> config = LossConfig(hidden_weight=8.0, ramp_start=4, ramp_steps=4)
    >>> [hidden_weight(step, config, 20) for step in (4, 5, 10, 15, 20)]
    [0.0, 1.5, 4.0, 2.0, 0.0]
    """
    return config.hidden_weight * ramp(step, config) * (1 - step / num_steps)


def hidden_loss(states_ND: Tensor, target_states_ND: Tensor) -> Tensor:
    """Return how much hidden states differ in direction, loss_N: 1 minus their cosine.

    (DistilBERT, https://arxiv.org/abs/1910.01108, section 3, has it for the last states.)

    >>> import torch
    >>> hidden_loss(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([0., 1.])
    """
    return ops.cosine_distance(target_states_ND, states_ND)


def fade(step: int, config: LossConfig, num_steps: int) -> float:
    """Return what is left of the weight of the members' losses at a step of `num_steps`.

    While the learning rate falls to its end, the model settles where the losses then pull it: so the
    full model comes close to where it would be alone, and the members, close by, lose little.

    >>> config = LossConfig(fade_from=0.5, fade_to=0.2)
    >>> [round(fade(step, config, 100), 2) for step in (0, 50, 75, 99)]
    [1.0, 1.0, 0.6, 0.22]
    """
    begin = config.fade_from * num_steps
    if step <= begin:
        return 1.0
    return 1.0 - (1.0 - config.fade_to) * (step - begin) / (num_steps - begin)


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the negative log-likelihood of each label, in nats; 0 where the label is `IGNORE_INDEX`.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100]))
    tensor([1.3863, 0.0000])
    """
    return ops.cross_entropy(logits_NV, labels_N)


def divergence(
    target_logits_NV: Tensor, draft_logits_NV: Tensor, config: LossConfig, temperature: float | None = None
) -> Tensor:
    """Return the divergence that a recipe names, with its own setting; value_N.

    Args:
        target_logits_NV: the teacher's.
        draft_logits_NV: the student's.
        config: the recipe's `loss` section.
        temperature: divisor of both; None is the recipe's.
    """
    name = config.divergence
    own = {SETTINGS[name]: getattr(config, SETTINGS[name])} if name in SETTINGS else {}
    return DIVERGENCES[name](target_logits_NV, draft_logits_NV, temperature or config.temperature, **own)
