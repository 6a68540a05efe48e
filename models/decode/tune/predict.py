"""`--draft auto`: the member that should draft fastest here, and how many tokens a round.

With acceptance alpha, gamma drafted tokens a round, a draft step that costs c target steps and a
target pass on m tokens that costs v(m) of them, speculative decoding is

    (1 - alpha^(gamma+1)) / ((1 - alpha) (gamma c + v(gamma+1)))

times as fast as plain decoding (https://arxiv.org/abs/2211.17192, theorem 3.8, where v is 1). alpha
was measured when the family was trained; c and v follow from the machine and are timed now. Only
speed depends on the choice. `nestling search` measures more and more precisely, and what it found
for this machine comes first: models/decode/tune/tuned.py.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

from models.base.stopwatch import Work, alternate
from models.checkpoint.family import Member
from models.decode.engine.costs import Costs
from models.decode.engine.state import Scorer
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED
from models.decode.tune.timing import filled_cache, one_pass, time_drafts, time_hosts, time_target
from models.elastic.model import ElasticLM
from models.machine.card import thread_counts

MAX_GAMMA = 8
DRAFT_STEPS = 4
TIMING_BUDGET = 0.4
# The formula leaves the host's own work out: a smaller gain than this is likely none.
LEAST_SPEEDUP = 1.02
# More threads must pay: fewer leave cores to others and wait less for each other.
THREADS_MARGIN = 1.05


@dataclass(frozen=True)
class Choice:
    """A draft, its tokens a round, and the speed over plain decoding that the formula predicts."""

    name: str
    gamma: int
    speedup: float


def speedup(alpha: float, gamma: int, c: float, v: float) -> float:
    """The formula above; `v` is v(gamma + 1).

    >>> round(speedup(0.8, 4, c=0.1, v=1.0), 2)
    2.4
    >>> speedup(1.0, 3, c=0.25, v=1.25)
    2.0
    """
    return round_speedup(sum(alpha**position for position in range(gamma + 1)), gamma, c, v)


def round_speedup(num_tokens: float, gamma: int, c: float, v: float) -> float:
    """The same where the tokens that a round gives are known."""
    return num_tokens / (gamma * c + v)


def best_speedup(alpha: float, c: float) -> float:
    """The formula at its best gamma, where a pass on a few tokens costs what one on one token does.

    >>> round(best_speedup(0.8, c=0.1), 2)
    2.47
    """
    return max(speedup(alpha, gamma, c, v=1.0) for gamma in range(1, MAX_GAMMA + 1))


def choose_draft(
    acceptance: Mapping[str, float], costs: Costs, *, least: float = LEAST_SPEEDUP
) -> Choice | None:
    """The best draft and gamma; None if plain decoding should be as fast.

    Args:
        acceptance: each candidate's chance that one drafted token is kept.
        costs: of the target and of these candidates.
        least: the smallest predicted speed-up that is worth it.

    >>> costs = Costs({1: 1.0, 2: 1.1, 3: 1.2}, {"S": 0.2, "L": 0.6})
    >>> best = choose_draft({"S": 0.8, "L": 0.9}, costs)
    >>> best.name, best.gamma, round(best.speedup, 3)
    ('S', 2, 1.525)
    >>> choose_draft({"S": 0.1, "L": 0.1}, costs) is None
    True
    """
    one = costs.target[1]
    choices = [
        Choice(name, m - 1, speedup(alpha, m - 1, costs.drafts[name] / one, seconds / one))
        for name, alpha in acceptance.items()
        for m, seconds in costs.target.items()
        if m > 1
    ]
    best = max(choices, key=lambda choice: choice.speedup, default=None)
    return best if best is not None and best.speedup >= least else None


def known_acceptance(
    members: Iterable[Member], params: SamplingParams, verifier: str = "block"
) -> dict[str, float]:
    """Acceptance of each measured member by name, the full model left out.

    A greedy draft is kept where its token is the full model's, so `match` tells; otherwise `alpha`, of
    which `coupled` guarantees alpha / (2 - alpha) only.
    """
    known = {}
    for member in members:
        share = member.alpha if not params.is_greedy or member.match is None else member.match / 100
        if share is None or member.granularity == "full" or not math.isfinite(share):
            continue
        share = min(share, 1.0)
        is_coupled = verifier == COUPLED and not params.is_greedy
        known[member.name] = share / (2 - share) if is_coupled else share
    return known


def measure_costs(
    model: ElasticLM, drafts: Mapping[str, Scorer], params: SamplingParams, verifier: str = "block"
) -> Costs:
    """Time target passes and rounds of each draft, with what choosing tokens takes, in about a second."""
    target = time_target(model, MAX_GAMMA + 1, budget=TIMING_BUDGET, clock=perf_counter)
    kind = params, verifier
    host = time_hosts(model, [kind], budget=TIMING_BUDGET, clock=perf_counter)[kind]
    steps = time_drafts(model, drafts, *kind, budget=TIMING_BUDGET, clock=perf_counter)
    return Costs(
        {m: seconds + host(m - 1) for m, seconds in target.items()},
        {name: step(DRAFT_STEPS) * target[1] for name, step in steps.items()},
    )


def best_num_threads(model: ElasticLM, most: int) -> int:
    """The number of threads, up to `most`, that this model's own passes on a few tokens run best at.

    The machine card's number is for weights that exceed the caches; a small model's passes may be
    over before a second thread has woken up.
    """
    if most == 1:
        return 1
    cache = filled_cache(model, MAX_GAMMA + 1)
    passes = [one_pass(model, cache, m) for m in {1, min(4, cache.num_positions - cache.length)}]
    before = torch.get_num_threads()
    cells = {num: _threaded(num, passes) for num in thread_counts(most)}
    seconds = alternate(cells, budget=TIMING_BUDGET / 2).shortest
    torch.set_num_threads(before)
    return min(num for num in seconds if seconds[num] <= THREADS_MARGIN * min(seconds.values()))


def _threaded(num_threads: int, passes: list[Work]) -> Work:
    def work() -> None:
        torch.set_num_threads(num_threads)
        for one in passes:
            one()

    return work
