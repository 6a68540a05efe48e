"""Verification: which drafted tokens stay, and the one token that follows them.

Every verifier takes p (the target's distributions at the gamma drafted positions and one more), q (the
distributions that the drafted tokens were really drawn from) and the drafted tokens. It returns the accepted
tokens and one of the target's: 1 to gamma + 1 tokens that follow the target's distribution for any draft.

    token   token by token up to the first rejection (Leviathan et al., arXiv 2211.17192;
            Chen et al., arXiv 2302.01318)
    block   decides on the block as a whole: never fewer tokens in expectation
            (Sun et al., arXiv 2403.10444)

T positions, V vocabulary; p target, q draft. The tests prove each verifier by exact enumeration.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.decode.sampling.rng import Random

Verifier = Callable[[Tensor, Tensor, Sequence[int], Random], list[int]]
"""(p_TV of gamma + 1 rows, q_TV of gamma rows, drafted, random) -> accepted tokens and one more."""


def verify_tokens(p_TV: Tensor, q_TV: Tensor, drafted: Sequence[int], random: Random) -> list[int]:
    """Accept d_t with probability min(1, p/q); the first rejection draws from the residual.

    If none is rejected, the bonus token is drawn from the target's distribution after all of them.
    """
    p_T, q_T = _probabilities(p_TV, drafted), _probabilities(q_TV, drafted)
    for t, (p, q) in enumerate(zip(p_T, q_T, strict=True)):
        if not random.accept(min(1.0, p / q)):
            return [*drafted[:t], random.target(residual(p_TV[t], q_TV[t]))]
    return [*drafted, random.target(p_TV[len(drafted)])]


def verify_block(p_TV: Tensor, q_TV: Tensor, drafted: Sequence[int], random: Random) -> list[int]:
    """Keep the longest prefix whose own test passes, even where a shorter one's failed.

    Algorithm 2 of https://arxiv.org/abs/2403.10444.
    """
    ratios = [1.0]  # the paper's p_t: the prefix under p relative to q, cut at 1 after each token
    p_T, q_T = _probabilities(p_TV, drafted), _probabilities(q_TV, drafted)
    for p, q in zip(p_T, q_T, strict=True):
        ratios.append(min(1.0, ratios[-1] * p / q))
    if random.accept(ratios[-1]):
        return [*drafted, random.target(p_TV[-1])]
    # The longest prefix that passes is kept, so tests run from the back; the empty one passes.
    num_kept, passes = len(drafted) - 1, _passes(ratios[:-1], p_TV, q_TV)
    while num_kept > 0 and not random.accept(passes[num_kept]):
        num_kept -= 1
    rest_V = residual(ratios[num_kept] * p_TV[num_kept], q_TV[num_kept])
    return [*drafted[:num_kept], random.target(rest_V)]


VERIFIERS: dict[str, Verifier] = {"token": verify_tokens, "block": verify_block}


def match(chosen: Sequence[int], drafted: Sequence[int]) -> list[int]:
    """Keep drafted tokens while they are the ones that the target chose, then one of its own.

    This is what every verifier does at temperature 0, without the distributions.

    >>> match([5, 6, 7], drafted=[5, 9])
    [5, 6]
    >>> match([5, 6, 7], drafted=[5, 6])
    [5, 6, 7]
    """
    num_kept = 0
    while num_kept < len(drafted) and drafted[num_kept] == chosen[num_kept]:
        num_kept += 1
    return list(chosen[: num_kept + 1])


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """Return the residual norm(max(p - q, 0)) of the target, or p itself where that is 0.

    >>> residual(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]))
    tensor([0., 1.])
    >>> residual(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    tensor([0.5000, 0.5000])
    """
    excess_V = (p_V - q_V).clamp_min(0.0)
    mass = excess_V.sum()
    return excess_V / mass if mass > 0 else p_V / p_V.sum()


def _passes(ratios: list[float], p_TV: Tensor, q_TV: Tensor) -> list[float]:
    """Return the chance that a prefix of 0, 1, .. tokens is kept if no longer one is (h in the paper)."""
    ratios_T1 = p_TV.new_tensor(ratios).unsqueeze(-1)
    excesses = (ratios_T1 * p_TV[: len(ratios)] - q_TV).clamp_min(0.0).sum(-1).tolist()  # a sync
    # Without excess nothing is left to draw after this prefix, so it must not be kept.
    return [
        excess / (excess + (1.0 - ratio)) if excess > 0 else 0.0
        for excess, ratio in zip(excesses, ratios, strict=True)
    ]


def _probabilities(probs_TV: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return each token's probability at its own position: one gather, one sync."""
    index_T1 = torch.tensor(tokens, dtype=torch.long, device=probs_TV.device).unsqueeze(-1)
    probs_T: list[float] = probs_TV[: len(tokens)].gather(-1, index_T1).squeeze(-1).tolist()
    return probs_T
