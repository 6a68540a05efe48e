"""How many tokens to draft, by how many texts are written at the same time.

A pass reads every weight once, whoever asks. A few tokens more cost nothing while that takes the time, and
their full price once the products do. So a server drafts for a few clients and decodes plainly for many;
where that turns is measured on this machine when it starts:

    tokens a second of n texts = n tau(gamma) / (gamma d(n) + t(n (gamma + 1)) + n host)

d is a draft's pass on n tokens, t the target's, tau the tokens of a round that the acceptance seen so far
promises. Who drafts how much never changes a text, only its speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from time import perf_counter

import numpy as np

from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft
from models.decode.engine.policy import PLAIN, Round, RoundPlan
from models.decode.engine.state import State
from models.decode.tune.predict import MAX_GAMMA
from models.decode.tune.timing import filled_cache, one_pass
from models.elastic.view import Model, Scorer

SIZES = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 3
HOST_SECONDS = 1e-4
"""What a text's round costs in Python besides its pass; that of a small machine."""
WEIGHT_OF_NEW = 0.02
"""Weight of a round in the acceptance seen so far, a mean that forgets."""
PLAIN_BEFORE_TRY = 200
"""Plain rounds after which one token is drafted, to see whether drafts have become better."""


@dataclass(frozen=True)
class PassCosts:
    """Measured seconds of passes by number of tokens."""

    target: Mapping[int, float]
    draft: Mapping[int, float]


def measure_passes(target: Model, draft: Scorer) -> PassCosts:
    """Time passes of both on several numbers of tokens, in about a second."""
    return PassCosts(_time(target), _time(draft))


def tokens_within(model: Model, seconds: float) -> int:
    """Return how many tokens of prompts a pass may read to take about so long, from 64 to 512."""
    times = _time(model, SIZES[-1:])
    size, measured = next(iter(times.items()), (1, seconds))
    return max(64, min(512, int(size * seconds / measured)))


def _time(model: Scorer, sizes: Sequence[int] = SIZES) -> dict[int, float]:
    cache = filled_cache(model.full, SIZES[-1])
    seconds = {}
    for size in (size for size in sizes if size <= cache.num_positions - cache.length):
        work = one_pass(model, cache, size)
        work()
        times = []
        for _ in range(REPEATS):
            started = perf_counter()
            work()
            times.append(perf_counter() - started)
        seconds[size] = median(times)
    return seconds


@dataclass
class Load:
    """What is common to all texts of a server: how many there are, and how well drafts did.

    Args:
        passes: measured costs.
        acceptance: a drafted token's chance to be kept, before the first round.
    """

    passes: PassCosts
    acceptance: float
    num_live: int = 1
    """Texts that are being written."""
    num_plain: int = field(default=0, init=False)
    """Plain rounds since the last drafted one."""

    def gamma(self) -> int:
        """Return the number of drafted tokens that promises the most tokens a second."""
        if self.num_plain >= PLAIN_BEFORE_TRY:
            return 1
        return _best_gamma(self.num_live, round(self.acceptance, 2), _Frozen(self.passes))

    def observe(self, done: Round) -> None:
        """Learn from a round."""
        self.num_plain = 0 if done.num_drafted else self.num_plain + 1
        reached = min(done.num_drafted, done.num_accepted + 1)
        for position in range(reached):
            kept = position < done.num_accepted
            self.acceptance += WEIGHT_OF_NEW * (kept - self.acceptance)


@dataclass(frozen=True)
class LoadPolicy:
    """One draft, as many tokens a round as the load promises to pay for; see `Policy`."""

    draft: Draft
    name: str
    load: Load
    costs: Costs | None = None

    def check(self, target: Model) -> None:
        """See `Policy`."""
        self.draft.check(target)

    def choose(self, state: State, most: int) -> RoundPlan:
        """See `Policy`."""
        gamma = min(self.load.gamma(), most)
        return RoundPlan(self.draft, gamma, self.name) if gamma else PLAIN

    def observe(self, done: Round) -> None:
        """See `Policy`."""
        self.load.observe(done)


class _Frozen:
    """Costs as a key that is compared by identity."""

    def __init__(self, passes: PassCosts) -> None:
        self.passes = passes

    def __hash__(self) -> int:
        return id(self.passes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and other.passes is self.passes


@lru_cache(maxsize=4096)
def _best_gamma(num_texts: int, acceptance: float, frozen: _Frozen) -> int:
    return best_gamma(num_texts, acceptance, frozen.passes)


def best_gamma(num_texts: int, acceptance: float, passes: PassCosts) -> int:
    """Return the number of drafted tokens, 0 among them, by the formula above.

    >>> flat = PassCosts({1: 10.0, 8: 10.5, 64: 60.0}, {1: 1.0, 64: 6.0})
    >>> best_gamma(1, 0.8, flat), best_gamma(64, 0.8, flat)
    (6, 0)
    """

    def speed(gamma: int) -> float:
        tokens = sum(acceptance**position for position in range(gamma + 1))
        draft = gamma * _seconds(passes.draft, num_texts)
        target = _seconds(passes.target, num_texts * (gamma + 1))
        return tokens / (draft + target + num_texts * HOST_SECONDS)

    return max(range(MAX_GAMMA + 1), key=speed)


def _seconds(seconds: Mapping[int, float], num_tokens: int) -> float:
    """Return the seconds of a pass on any number of tokens; beyond the largest measured in proportion."""
    sizes, values = zip(*sorted(seconds.items()), strict=True)
    if num_tokens > sizes[-1]:
        return float(values[-1] * num_tokens / sizes[-1])
    return float(np.interp(num_tokens, sizes, values))
