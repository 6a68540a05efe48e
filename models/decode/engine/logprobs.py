"""Log-probabilities of tokens by the model's own distribution, before any setting of sampling.

T positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Logprobs(NamedTuple):
    """Log-probabilities at one position of a text."""

    logprob: float
    """That of the token that stands there."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens with theirs, the likeliest first."""


def logprobs_of(logits_TV: Tensor, ids: Sequence[int], num_top: int) -> list[Logprobs]:
    """Return the log-probabilities of each token by the row of logits that it was chosen from.

    >>> logits_TV = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> [one] = logprobs_of(logits_TV, [1], num_top=1)
    >>> f"{one.logprob:.4f}", one.top[0][0]
    ('-1.3863', 0)
    """
    x_TV = torch.log_softmax(logits_TV[: len(ids)].float(), dim=-1)
    chosen_T = x_TV[torch.arange(len(ids)), torch.tensor(ids, dtype=torch.long)].tolist()
    values_TN, tokens_TN = x_TV.topk(min(num_top, x_TV.shape[-1]), dim=-1)
    rows = zip(tokens_TN.tolist(), values_TN.tolist(), strict=True)
    top = [tuple(zip(tokens, values, strict=True)) for tokens, values in rows]
    return [Logprobs(*one) for one in zip(chosen_T, top, strict=True)]
