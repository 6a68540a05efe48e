"""The sizes of the distribution tests, and the time that they take on a model: small or all of them.

A walk through a few tokens makes as many passes on any model, so that they are counted once, here, and timed
on the user's model before anything begins. Fewer tokens, draws and words make the same kinds of tests, by the
same drafts and verifiers; what the draws can see is in each test's note.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

from models.elastic.granularity import FULL as ALL
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import View

DEFAULT_MINUTES = 5.0
"""A model on which all tests take longer is given the small ones, unless asked otherwise."""
TIMED = 3
"""Passes that are timed; the shortest counts."""
SECONDS_PER_DRAW = 0.6e-3
DRAFT_COST = 0.8
"""A pass of a draft over one of the full model, as members of the default family have it."""
CERTAINTY = 2.33
"""Standard deviations of a test of counts that sees a difference 99 times of 100."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The sizes of a plan.

    Args:
        name: its name on the command line.
        num_tokens: Tokens of a walk by gamma: its branches grow faster than tokens ** (gamma + 2).
        num_trials: Texts drawn for each test of counts.
        length: Tokens of each continuation of the whole model.
        walk_passes: Passes of the few-token model in float64, whose number of drafts matters little.
        seconds: Time that choices and sums take, whatever the model.
    """

    name: str
    num_tokens: Mapping[int, int]
    num_trials: int
    length: int
    walk_passes: int
    seconds: float


FULL = Effort(
    name="full", num_tokens={1: 5, 2: 4, 3: 2}, num_trials=10_000, length=64, walk_passes=2050, seconds=25.0
)
QUICK = Effort(
    name="quick", num_tokens={1: 3, 2: 3, 3: 2}, num_trials=2_000, length=24, walk_passes=1170, seconds=9.0
)
EFFORTS: Mapping[str, Effort] = {one.name: one for one in (QUICK, FULL)}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a pass on one token.

    Args:
        precise: of the few-token model in float64.
        own: of the few-token model in the dtype that decodes.
        wholes: of all whole models together.
    """

    precise: float
    own: float
    wholes: float

    def seconds(self, effort: Effort, *, num_prompts: int, num_drafts: int, num_samplings: int) -> float:
        """Return the estimate for a plan.

        Args:
            effort: its sizes.
            num_prompts: prompts of the whole models.
            num_drafts: drafts of the plan that are models.
            num_samplings: samplings of the identities.
        """
        walks = effort.walk_passes * self.precise + effort.walk_passes / 2 * self.own
        written = num_prompts * effort.length * num_samplings
        # alone once; a draft: 0.6 passes of its own on each token and more of its draft; two controllers
        identities = written * (1 + (num_drafts + 1) * (0.6 + 3 * DRAFT_COST) + 2 * 1.5) * self.wholes
        return walks + identities + 7 * effort.num_trials * SECONDS_PER_DRAW + effort.seconds


@torch.inference_mode()
def time_pass(model: ElasticLM) -> float:
    """Return seconds of a pass of decoding on one token, the shortest of a few."""
    view, request = View(model, ALL), Request(ids=[0], cache=model.new_cache(1), num_last=1)
    seconds = []
    for _ in range(1 + TIMED):
        start = perf_counter()
        view.run([request])
        seconds.append(perf_counter() - start)
    return min(seconds[1:])


def visible_distance(num_trials: int, num_texts: int, bound: float) -> float:
    """Return the total variation that a test of counts sees 99 times of 100.

    Pearson's statistic of n draws grows by n times the chi-square distance, which is at least four times
    the square of total variation.

    >>> round(visible_distance(10_000, 256, 1e-8), 3), round(visible_distance(2_000, 81, 1e-8), 3)
    (0.077, 0.14)
    """
    freedom = max(1, num_texts - 1)
    limit = _quantile(freedom, bound)
    low, high = 0.0, 4 * limit + 100.0
    for _ in range(60):
        middle = (low + high) / 2
        seen = freedom + middle - CERTAINTY * math.sqrt(2 * (freedom + 2 * middle)) >= limit
        low, high = (low, middle) if seen else (middle, high)
    return min(1.0, math.sqrt(high / num_trials) / 2)


def _quantile(freedom: int, chance: float) -> float:
    """Return what a chi-square exceeds with this chance."""
    low, high = 0.0, 10.0 * freedom + 1000.0
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        above = float(torch.special.gammaincc(half, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if above > chance else (low, middle)
    return high
