"""Processors turn logits into the distribution that a token is drawn from.

First the repetition penalty, then temperature, top-k, top-p and min-p: the order of transformers.

The target's logits and the draft's go through the same function with the same parameters, so that p
and q are the distributions that tokens are really drawn from. Speculative decoding is exact for any q, but
only if q is that distribution.

T positions, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from models.base.errors import UsageError
from models.base.kinds import real_number, whole_number

# Most nuclei are small: look among this many tokens before sorting the whole vocabulary.
NUCLEUS_GUESS = 256
MIN_TEMPERATURE = 1e-38
"""A much smaller one is 0 in fp32, or has no finite inverse there."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of the choice of a token from logits; the defaults are greedy, and None is the default.

    >>> SamplingParams(temperature=0.8, top_k=40).is_greedy
    False
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach p; 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens that are at least this many times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that the text already has, and multiplies negative ones
    (Keskar et al., https://arxiv.org/abs/1909.05858); 1 changes nothing. Greedy decoding obeys it too."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            checked = whole_number if field.name == "top_k" else real_number
            value = field.default if value is None else checked(field.name, value)
            object.__setattr__(self, field.name, value)
        problems = [
            f"{flag} must be {right}, got {value}"
            for flag, value, holds, right in (
                (
                    "--temperature",
                    self.temperature,
                    self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
                    f"0 (greedy), or {MIN_TEMPERATURE} or more",
                ),
                ("--top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
                ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
                ("--min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 (off) to 1"),
                (
                    "--repetition-penalty",
                    self.repetition_penalty,
                    0 < self.repetition_penalty < math.inf,
                    "above 0; 1 is off",
                ),
            )
            if not holds
        ]
        if problems:
            raise UsageError("; ".join(problems))

    @property
    def depends_on_text(self) -> bool:
        """True if the distribution depends on more of the text than the logits do."""
        return self.repetition_penalty != 1.0

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is taken, so that nothing is random."""
        return self.temperature == 0.0


GREEDY = SamplingParams()


def sampling_probs(logits_TV: Tensor, params: SamplingParams) -> Tensor:
    """Return the probabilities [T, V] that a token is drawn with, in fp32 (fp64 for fp64 logits).

    The repetition penalty depends on the text and comes before: `penalise`. Rows sum to 1. Among
    equal logits the lower id counts as the likelier one.

    >>> sampling_probs(torch.tensor([[2.0, 2.0, 1.0]]), SamplingParams())
    tensor([[1., 0., 0.]])
    >>> logits_TV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> sampling_probs(logits_TV, SamplingParams(temperature=1.0, top_k=2))
    tensor([[0.6250, 0.3750, 0.0000]])
    >>> sampling_probs(logits_TV, SamplingParams(temperature=1.0, top_p=0.4))
    tensor([[1., 0., 0.]])
    >>> sampling_probs(logits_TV, SamplingParams(temperature=1.0, min_p=0.5))
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    x_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    if params.is_greedy:
        return torch.zeros_like(x_TV).scatter_(-1, x_TV.argmax(-1, keepdim=True), 1.0)
    if params.temperature != 1.0:
        # The maximum goes first: a tiny temperature must not turn finite logits into infinities.
        x_TV = (x_TV - x_TV.amax(-1, keepdim=True)) / params.temperature
    probs_TV = torch.softmax(x_TV, dim=-1)
    if 0 < params.top_k < probs_TV.shape[-1]:
        probs_TV = _top_k(probs_TV, params.top_k)
    if params.top_p < 1.0:
        probs_TV = _top_p(probs_TV, params.top_p)
    if params.min_p > 0.0:
        probs_TV = _min_p(probs_TV, params.min_p)
    return probs_TV


def penalise(
    logits_TV: Tensor, params: SamplingParams, prefix: Iterable[int], drafted: Sequence[int] = ()
) -> Tensor:
    """Apply the repetition penalty to logits [T, V]; row t follows `prefix` and the first t of `drafted`.

    >>> params = SamplingParams(repetition_penalty=2.0)
    >>> penalise(torch.tensor([[4.0, -1.0, 3.0]] * 2), params, prefix=[1], drafted=[0])
    tensor([[ 4., -2.,  3.],
            [ 2., -2.,  3.]])
    """
    if not params.depends_on_text:
        return logits_TV
    x_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    seen_TV = torch.zeros_like(x_TV, dtype=torch.bool)
    seen_TV[:, torch.tensor([*prefix], dtype=torch.long, device=x_TV.device)] = True
    for t, token in enumerate(drafted, start=1):
        seen_TV[t:, token] = True
    penalty = params.repetition_penalty
    return torch.where(seen_TV, torch.where(x_TV > 0, x_TV / penalty, x_TV * penalty), x_TV)


def _top_k(probs_TV: Tensor, k: int) -> Tensor:
    least_T1 = probs_TV.topk(k, dim=-1).values[..., -1:]
    return _keep_largest(probs_TV, torch.full_like(least_T1, k, dtype=torch.long), least_T1)


def _top_p(probs_TV: Tensor, p: float) -> Tensor:
    num_tokens = probs_TV.shape[-1]
    sorted_TN = probs_TV.topk(min(NUCLEUS_GUESS, num_tokens), dim=-1).values
    reached_TN = sorted_TN.cumsum(-1)
    if bool((reached_TN[..., -1] < p).any()):  # the guess was too small for some row
        sorted_TN = probs_TV.sort(dim=-1, descending=True).values
        reached_TN = sorted_TN.cumsum(-1)
    # One more than the tokens that do not reach p; rounding may leave the whole row short of it.
    count_T1 = ((reached_TN < p).sum(-1, keepdim=True) + 1).clamp_max(sorted_TN.shape[-1])
    return _keep_largest(probs_TV, count_T1, sorted_TN.gather(-1, count_T1 - 1))


def _min_p(probs_TV: Tensor, p: float) -> Tensor:
    probs_TV = torch.where(probs_TV < p * probs_TV.amax(-1, keepdim=True), 0.0, probs_TV)
    return probs_TV / probs_TV.sum(-1, keepdim=True)


def _keep_largest(probs_TV: Tensor, count_T1: Tensor, least_T1: Tensor) -> Tensor:
    """Keep the `count` largest, of which `least` is the smallest, and normalise.

    Of those equal to `least` the lowest ids stay.
    """
    above_TV = probs_TV > least_T1
    tied_TV = probs_TV == least_T1
    room_T1 = count_T1 - above_TV.sum(-1, keepdim=True)
    kept_TV = above_TV | (tied_TV & (tied_TV.cumsum(-1) <= room_T1))
    probs_TV = torch.where(kept_TV, probs_TV, 0.0)
    return probs_TV / probs_TV.sum(-1, keepdim=True)
