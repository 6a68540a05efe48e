"""Random choices of decoding, behind five verbs.

The draft's tokens, the acceptance and the target's tokens (residual and bonus) come from three
separate streams: a draft that takes more or fewer numbers must not move the numbers that acceptance
sees. `models/verify/exact.py` puts an object here that tries every choice in turn, which gives the
engine's exact output distribution without sampling.

The last verb is for `coupled` decoding: noise that belongs to a position of the text and not to
who asks for it, so that draft and target choose by the same numbers.
"""

import math
import random
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Random(Protocol):
    """Random choices of one request."""

    def draft(self, probs_V: Tensor) -> int:
        """Draw a token from the draft's distribution."""
        ...

    def uniforms(self, count: int) -> list[float] | None:
        """Take the numbers in [0, 1) that draw the next `count` tokens of the draft, one after another.

        They are taken: tokens come from them or from `draft`. None if this chooses otherwise.
        """
        ...

    def accept(self, probability: float) -> bool:
        """Return True with this probability; 1 or more is always true, 0 never."""
        ...

    def target(self, probs_V: Tensor) -> int:
        """Draw a token from the target's distribution or from a residual of it."""
        ...

    def noise(self, position: int, num_tokens: int) -> Tensor:
        """Return the Gumbel noise [V] of a position of the text: the same every time."""
        ...


class SeededRandom:
    """The same seed makes the same choices, on any device; rows of a batch make their own.

    >>> ours, theirs = SeededRandom(7), SeededRandom(7)
    >>> probs_V = torch.tensor([0.25, 0.0, 0.75])
    >>> [ours.draft(probs_V) for _ in range(4)] == [theirs.draft(probs_V) for _ in range(4)]
    True
    """

    def __init__(self, seed: int, row: int = 0) -> None:
        self._seed, self._row = seed, row
        name = f"{seed}/{row}" if row else f"{seed}"
        self._draft = random.Random(f"{name}/draft")
        self._accept = random.Random(f"{name}/accept")
        self._target = random.Random(f"{name}/target")

    def draft(self, probs_V: Tensor) -> int:
        """See `Random`."""
        return _invert(probs_V, self._draft.random())

    def uniforms(self, count: int) -> list[float]:
        """See `Random`."""
        return [self._draft.random() for _ in range(count)]

    def accept(self, probability: float) -> bool:
        """See `Random`."""
        return self._accept.random() < probability

    def target(self, probs_V: Tensor) -> int:
        """See `Random`."""
        return _invert(probs_V, self._target.random())

    def noise(self, position: int, num_tokens: int) -> Tensor:
        """See `Random`."""
        return gumbel_noise(self._seed, position, num_tokens, row=self._row)


# The draft asks for a position's noise, then the target does: a few rounds' worth is kept.
@lru_cache(maxsize=64)
def gumbel_noise(seed: int, position: int, num_tokens: int, *, row: int = 0) -> Tensor:
    """Return standard Gumbel noise [num_tokens] in float64, a pure function of the arguments.

    Philox (Salmon et al. 2011) turns a key (seed, row) and a counter (position, index) into integers,
    the same on every machine; nothing is carried from one position to the next.

    >>> gumbel_noise(7, 3, 4).equal(gumbel_noise(7, 3, 8)[:4])
    True
    """
    key = np.array([seed % 2**64, row], dtype=np.uint64)
    # The generator counts up from the first word: the last one keeps positions apart.
    counter = np.array([0, 0, 0, position], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(num_tokens)
    # 52 bits and a half step: strictly between 0 and 1, and exact in float64.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return torch.from_numpy(-np.log(-np.log(uniform)))


def _invert(probs_V: Tensor, uniform: float) -> int:
    """Return the first token whose cumulative probability exceeds the uniform.

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
