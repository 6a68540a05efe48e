"""Every random choice of decoding, behind three verbs.

The draft's tokens, the acceptance and the target's tokens (residual and bonus) come from three
separate streams: a draft that takes more or fewer numbers must not move the numbers that acceptance
sees. Tests put an object here that tries every choice in turn, which gives the engine's exact output
law without sampling.
"""

import math
import random
from typing import Protocol

import torch
from torch import Tensor


class Random(Protocol):
    """The choices of one request."""

    def draft(self, probs_V: Tensor) -> int:
        """A token from the draft's law."""
        ...

    def accept(self, probability: float) -> bool:
        """True with this probability; 1 or more is always true, 0 never."""
        ...

    def target(self, probs_V: Tensor) -> int:
        """A token from the target's law or from a residual of it."""
        ...


class SeededRandom:
    """The same seed makes the same choices, on any device.

    >>> ours, theirs = SeededRandom(7), SeededRandom(7)
    >>> probs_V = torch.tensor([0.25, 0.0, 0.75])
    >>> [ours.draft(probs_V) for _ in range(4)] == [theirs.draft(probs_V) for _ in range(4)]
    True
    """

    def __init__(self, seed: int) -> None:
        self._draft = random.Random(f"{seed}/draft")
        self._accept = random.Random(f"{seed}/accept")
        self._target = random.Random(f"{seed}/target")

    def draft(self, probs_V: Tensor) -> int:
        """See `Random`."""
        return _invert(probs_V, self._draft.random())

    def accept(self, probability: float) -> bool:
        """See `Random`."""
        return self._accept.random() < probability

    def target(self, probs_V: Tensor) -> int:
        """See `Random`."""
        return _invert(probs_V, self._target.random())


def _invert(probs_V: Tensor, uniform: float) -> int:
    """The first token whose cumulative probability exceeds the uniform.

    That of a token without probability is its predecessor's, so it is never the first.

    >>> [_invert(torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]), u) for u in (0.0, 0.49, 0.5, 1.0)]
    [1, 1, 3, 3]
    """
    cumulative_V = probs_V.cumsum(-1, dtype=torch.float64)
    # A sync: the sum differs from 1 by rounding, and the point must stay below it.
    total = float(cumulative_V[-1])
    point = min(uniform * total, math.nextafter(total, 0.0))
    # The second sync: the next step needs the token on the host.
    return int(torch.searchsorted(cumulative_V, point, right=True))
