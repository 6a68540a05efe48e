"""Costs of decoding on this machine, as models/decode/tune/timing.py measures them.

A round that drafts gamma tokens takes

    gamma drafted tokens + a target pass on gamma + 1 tokens + what the host does besides
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Measured seconds: a target pass on m tokens for m = 1, 2, ..., and a step of each draft."""

    target: Mapping[int, float]
    drafts: Mapping[str, float]


@dataclass(frozen=True)
class HostCosts:
    """Seconds of a round with gamma drafted tokens besides its passes and drafts, for some gammas."""

    seconds: Mapping[int, float]

    def __call__(self, gamma: int) -> float:
        """Return the seconds for any gamma; beyond the largest one measured along the last slope.

        >>> HostCosts({0: 1.0, 1: 2.0, 4: 8.0})(2), HostCosts({0: 1.0, 1: 2.0, 4: 8.0})(6)
        (4.0, 12.0)
        """
        gammas, values = zip(*sorted(self.seconds.items()), strict=True)
        if gamma > gammas[-1]:
            slope = (values[-1] - values[-2]) / (gammas[-1] - gammas[-2])
            return float(values[-1] + slope * (gamma - gammas[-1]))
        return float(np.interp(gamma, gammas, values))


@dataclass(frozen=True)
class DraftCosts:
    """The cost of a round's drafted tokens, in target passes on one token.

    The first one finds the target's weights in the processor's caches, and not its own.
    """

    first: float
    more: float
    """The cost of each further token."""

    def __call__(self, gamma: int) -> float:
        """Return the mean cost of one of `gamma` drafted tokens.

        >>> DraftCosts(first=0.5, more=0.25)(4)
        0.3125
        """
        return (self.first + (gamma - 1) * self.more) / gamma
