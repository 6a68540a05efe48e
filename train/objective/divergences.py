"""Divergences from the target's distribution p to the draft's q, per token.

Each is a pure function of logits and gives one value per token, in fp32 and in nats, without a
reduction. It is 0 at p = q, never negative, and finite, with finite gradients, where logits are
-inf on either side. A row needs at least one finite logit; a probability below `TINY` counts as `TINY`
where its logarithm is taken, which caps a KL at about 87 nats.

Temperature divides both sides' logits. No value is multiplied by its square: that factor restores the
gradient's scale for KL alone (https://arxiv.org/abs/1503.02531, section 2) and would be wrong for total
variation. Nothing is detached here: a caller who trains only q detaches p.

Legend: N tokens, V vocabulary, p target, q draft.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.elastic import ops
from models.elastic.ops import LOG_TINY, TINY

Divergence = Callable[..., Tensor]
"""A divergence maps `(target_logits_NV, draft_logits_NV, temperature=1.0, **its own settings)` to value_N."""


def forward_kl(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p, q), nats: what distillation usually minimises; q must cover all of p.

    >>> p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])
    >>> forward_kl(p, p), forward_kl(q, p)
    (tensor([0.]), tensor([0.6931]))
    """
    return ops.forward_kl(target_logits_NV, draft_logits_NV, temperature)


def reverse_kl(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q, p), nats: q may leave parts of p out (MiniLLM, https://arxiv.org/abs/2306.08543)."""
    return forward_kl(draft_logits_NV, target_logits_NV, temperature)


def jensen_shannon(
    target_logits_NV: Tensor,
    draft_logits_NV: Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 0.5,
) -> Tensor:
    """`beta KL(p, m) + (1 - beta) KL(q, m)` with `m = beta p + (1 - beta) q`, nats.

    Generalised Jensen-Shannon of GKD (https://arxiv.org/abs/2306.13649, eq. 1), 0 < beta < 1. Divided by
    beta it tends to the forward KL as beta tends to 0; divided by 1 - beta, to the reverse KL as it
    tends to 1.

    >>> p, q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    >>> jensen_shannon(p, q)  # log 2: no token in common
    tensor([0.6931])
    """
    log_p_NV = ops.log_softmax(target_logits_NV, temperature)
    log_q_NV = ops.log_softmax(draft_logits_NV, temperature)
    to_p_N = _kl_to_mixture(log_p_NV, log_q_NV, weight=beta)
    return beta * to_p_N + (1 - beta) * _kl_to_mixture(log_q_NV, log_p_NV, weight=1 - beta)


def skew_kl(
    target_logits_NV: Tensor,
    draft_logits_NV: Tensor,
    temperature: float = 1.0,
    *,
    skew: float = 0.1,
) -> Tensor:
    """`KL(p, skew p + (1 - skew) q)`, nats, at most -log skew (DistiLLM, https://arxiv.org/abs/2402.03898).

    A skew of 0 is the forward KL; towards 1 it vanishes.

    >>> p, q = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    >>> skew_kl(p, q, skew=0.1)
    tensor([2.3026])
    """
    log_p_NV = ops.log_softmax(target_logits_NV, temperature)
    log_q_NV = ops.log_softmax(draft_logits_NV, temperature)
    return _kl_to_mixture(log_p_NV, log_q_NV, weight=skew)


def total_variation(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Half the sum of |p - q|, between 0 and 1: the chance that a drafted token is refused, 1 - alpha.

    >>> total_variation(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]))
    tensor([0.5000])
    """
    return 1 - ops.overlap(target_logits_NV, draft_logits_NV, temperature)


def neg_log_alpha(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """-log of the acceptance alpha = sum of min(p, q), nats (LK losses, https://arxiv.org/abs/2602.23881).

    Its gradient is total variation's divided by alpha: a draft that is rarely accepted still learns.

    >>> neg_log_alpha(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]))
    tensor([0.6931])
    """
    overlap_N = ops.overlap(target_logits_NV, draft_logits_NV, temperature)
    return 0.0 - overlap_N.clamp_min(TINY).log()  # a plain minus would give -0.0 at p = q


def kl_tv(
    target_logits_NV: Tensor,
    draft_logits_NV: Tensor,
    temperature: float = 1.0,
    *,
    eta: float = 3.0,
) -> Tensor:
    """`lambda KL(p, q) + (1 - lambda) TV(p, q)` with `lambda = exp(-eta alpha)`, alpha held constant.

    The adaptive hybrid of LK losses (https://arxiv.org/abs/2602.23881; eta = 3 is the paper's best): KL while
    the draft is far, total variation once it is near. The paper takes alpha as a mean over the batch;
    here each token has its own, so that a token's loss does not depend on its companions and gradients
    stay equal under any accumulation. An eta of 0 is the forward KL, a large one total variation.

    >>> p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> torch.equal(kl_tv(p, q, eta=0.0), forward_kl(p, q))
    True
    """
    log_p_NV = ops.log_softmax(target_logits_NV, temperature)
    log_q_NV = ops.log_softmax(draft_logits_NV, temperature)
    variation_N = _variation(log_p_NV.exp(), log_q_NV.exp())
    kl_weight_N = torch.exp(-eta * (1 - variation_N.detach()))
    return kl_weight_N * ops.kl(log_p_NV, log_q_NV) + (1 - kl_weight_N) * variation_N


DIVERGENCES: Mapping[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "skew_kl": skew_kl,
    "neg_log_alpha": neg_log_alpha,
    "kl_tv": kl_tv,
}

SETTINGS: Mapping[str, str] = {"jensen_shannon": "beta", "skew_kl": "skew", "kl_tv": "eta"}
"""The divergences with a setting of their own, and its name."""


@torch.no_grad()
def alpha(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Expected acceptance of one drafted token, sum of min(p, q), in [0, 1]; for measuring.

    >>> alpha(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]))
    tensor([0.5000])
    """
    return ops.overlap(target_logits_NV, draft_logits_NV, temperature)


@torch.no_grad()
def greedy_match(target_logits_NV: Tensor, draft_logits_NV: Tensor) -> Tensor:
    """Return whether both sides' most likely token is the same, bool; for measuring.

    >>> greedy_match(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 3.0], [2.0, 3.0]]))
    tensor([ True, False])
    """
    return target_logits_NV.argmax(-1) == draft_logits_NV.argmax(-1)


def _kl_to_mixture(log_p_NV: Tensor, log_q_NV: Tensor, weight: float) -> Tensor:
    """KL(p, weight p + (1 - weight) q), from log(m / p) = log(1 + (1 - weight) (q / p - 1)).

    Written so it is exactly 0 at p = q, and q / p stays below the largest fp32 number.
    """
    if weight == 0:
        return ops.kl(log_p_NV, log_q_NV)
    gap_NV = log_q_NV.clamp_min(LOG_TINY) - log_p_NV.clamp_min(LOG_TINY)
    # rounding must not bring the argument to -1, where a tiny weight would be lost altogether
    excess_NV = ((1 - weight) * torch.expm1(gap_NV)).clamp_min(-1 + torch.finfo(torch.float32).eps)
    return -(log_p_NV.exp() * torch.log1p(excess_NV)).sum(-1).clamp_max(0.0)


def _variation(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    return 0.5 * (p_NV - q_NV).abs().sum(-1)
