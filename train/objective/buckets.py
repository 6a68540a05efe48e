"""Divergences from a teacher of whom only some probabilities are known, for each token.

    buckets   the k most likely tokens, and all others as one: any divergence, between the two
              distributions over k + 1 buckets. It is 0 where the two agree and never above the dense one.
    samples   n draws from the teacher with its log-probability of each: a divergence that is an expectation
              over the teacher, of a function of q / p, is estimated without bias (random sampling knowledge
              distillation, https://arxiv.org/abs/2503.16870).

A student learns the same optimum as from all probabilities. The k most likely ones renormalised to 1, without
the last bucket, would pull it to another: see docs/distillation.md.

N tokens, V vocabulary, K tokens that are named for each; p teacher, q student.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.elastic import ops
from train.objective.divergences import SETTINGS
from train.objective.losses import divergence
from train.recipe.sections import LossConfig

LEAST = torch.finfo(torch.float32).eps
"""The smallest probability of the last bucket: what is left of 1 has no more digits."""


def bucket_divergence(
    log_p_NB: Tensor, ids_NK: Tensor, logits_NV: Tensor, config: LossConfig, temperature: float
) -> Tensor:
    """Return the divergence [N] over K + 1 buckets that a recipe names.

    Args:
        log_p_NB: the teacher's log-probabilities of each row's K tokens and of all others.
        ids_NK: the tokens, different ones in a row.
        logits_NV: the student's.
        config: the divergence and its own setting.
        temperature: divisor of the student's logits; the teacher's were divided before.
    """
    log_q_NB = bucket_log_probs(logits_NV, ids_NK, temperature)
    return divergence(log_p_NB, log_q_NB, config, temperature=1.0)


def sampled_divergence(
    log_p_NK: Tensor,
    weights_NK: Tensor,
    ids_NK: Tensor,
    logits_NV: Tensor,
    config: LossConfig,
    temperature: float,
) -> Tensor:
    """Return an unbiased estimate [N] of the divergence that a recipe names; it may be negative.

    Args:
        log_p_NK: the teacher's log-probabilities of the tokens.
        weights_NK: the fraction of a row's draws that each token was.
        ids_NK: the tokens.
        logits_NV: the student's.
        config: names a divergence of `SAMPLED`.
        temperature: divisor of the student's logits.
    """
    log_q_NK = bucket_log_probs(logits_NV, ids_NK, temperature)[:, :-1]
    own = getattr(config, SETTINGS[config.divergence]) if config.divergence in SETTINGS else 0.0
    return (weights_NK * SAMPLED[config.divergence](log_q_NK - log_p_NK, own)).sum(-1)


def _reverse(log_ratio: Tensor, _: float) -> Tensor:
    return log_ratio.exp() * log_ratio


def _variation(log_ratio: Tensor, _: float) -> Tensor:
    return (1 - log_ratio.exp()).clamp_min(0.0)


def _log_mixture(log_ratio: Tensor, weight: float) -> Tensor:
    """Return log(m / p) of the mixture m = weight p + (1 - weight) q."""
    return torch.log(weight + (1 - weight) * log_ratio.exp())


def _jensen_shannon(log_ratio: Tensor, beta: float) -> Tensor:
    log_m = _log_mixture(log_ratio, beta)
    return -beta * log_m + (1 - beta) * log_ratio.exp() * (log_ratio - log_m)


SAMPLED: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "forward_kl": lambda log_ratio, _: -log_ratio,
    "reverse_kl": _reverse,
    "total_variation": _variation,
    "jensen_shannon": _jensen_shannon,
    "skew_kl": lambda log_ratio, skew: -_log_mixture(log_ratio, skew),
}
"""Each divergence D as f with D = E of f(log(q / p)) over tokens of p; the others are no such expectation."""


def bucket_log_probs(logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities [N, K + 1] of each row's K tokens, and of all others together.

    >>> bucket_log_probs(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[2, 0]])).exp()
    tensor([[0.2500, 0.2500, 0.5000]])
    """
    assert temperature > 0, temperature
    if temperature != 1:
        logits_NV = logits_NV.to(ops.at_least_fp32(logits_NV.dtype)) / temperature
    found_NB: Tensor = _BucketLogProbs.apply(logits_NV, ids_NK)  # type: ignore[no-untyped-call]
    return found_NB


def log_sum(logits_NV: Tensor, id_N: Tensor) -> Tensor:
    """Return log sum exp [N] of each row, by the compiled cross-entropy where there is one.

    Args:
        logits_NV: the logits; where they require a gradient, it is kept.
        id_N: a token of each row whose logit is finite.
    """
    picked_N = logits_NV.gather(1, id_N.unsqueeze(1)).squeeze(1)
    with torch.enable_grad():  # only what is trained through is compiled
        loss_N = ops.cross_entropy(logits_NV.detach().requires_grad_(), id_N)
    return loss_N.detach() + picked_N


class _BucketLogProbs(torch.autograd.Function):
    """With its backward pass written out: one walk over the vocabulary in each direction.

    The gradient of a logit is that of cross-entropy, scaled, with a correction at the K tokens:
    `-q_v G + g_v` for a named token and `q_v (g_rest / rest - G)` for another, G the sum of all g.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
        with torch.enable_grad():
            inner_NV = logits_NV.detach().requires_grad_()
            loss_N = ops.cross_entropy(inner_NV, ids_NK[:, 0].contiguous())
        named_NK = logits_NV.gather(1, ids_NK).to(loss_N.dtype)
        log_q_NK = named_NK - (loss_N.detach() + named_NK[:, 0]).unsqueeze(1)
        rest_N1 = (1 - log_q_NK.double().exp().sum(-1, keepdim=True)).clamp_min(LEAST).to(log_q_NK.dtype)
        ctx.inner = inner_NV, loss_N
        ctx.save_for_backward(ids_NK, log_q_NK, rest_N1)
        return torch.cat([log_q_NK, rest_N1.log()], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NB: Tensor) -> tuple[Tensor, None]:
        ids_NK, log_q_NK, rest_N1 = ctx.saved_tensors
        inner_NV, loss_N = ctx.inner
        grad_NK, grad_rest_N1 = grad_NB[:, :-1], grad_NB[:, -1:]
        total_N1 = grad_NB.sum(-1, keepdim=True)
        scale_N1 = grad_rest_N1 / rest_N1 - total_N1
        (grad_NV,) = torch.autograd.grad(loss_N, inner_NV, scale_N1.squeeze(1), retain_graph=True)
        named_NK = grad_NK - log_q_NK.exp() * (total_N1 + scale_N1)
        named_NK[:, 0] += scale_N1.squeeze(1)  # cross-entropy's own token
        return grad_NV.scatter_add_(1, ids_NK, named_NK.to(grad_NV.dtype)), None
