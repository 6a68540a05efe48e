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
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter

import torch

from models.checkpoint.family import Member
from models.decode.engine.costs import Costs
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED
from models.decode.tune.draft_plan import DraftPlan, DraftSpec, Speed
from models.decode.tune.timing import filled_cache, one_pass, time_drafts, time_hosts, time_target
from models.elastic.model import ElasticLM
from models.elastic.view import Scorer
from models.machine.threads import fastest_threads, thread_counts

MAX_GAMMA = 8
DRAFT_STEPS = 4
TIMING_BUDGET = 0.4
# The formula leaves the host's own work out: a smaller gain than this is likely none.
LEAST_SPEEDUP = 1.02


def speedup(alpha: float, gamma: int, c: float, v: float) -> float:
    """Return the formula above; `v` is v(gamma + 1).

    >>> round(speedup(0.8, 4, c=0.1, v=1.0), 2)
    2.4
    >>> speedup(1.0, 3, c=0.25, v=1.25)
    2.0
    """
    return round_speedup(sum(alpha**position for position in range(gamma + 1)), gamma, c, v)


def round_speedup(num_tokens: float, gamma: int, c: float, v: float) -> float:
    """Return the same where the tokens that a round gives are known."""
    return num_tokens / (gamma * c + v)


def best_speedup(alpha: float, c: float) -> float:
    """Return the formula at its best gamma, where a pass on a few tokens costs what one on one token does.

    >>> round(best_speedup(0.8, c=0.1), 2)
    2.47
    """
    return max(speedup(alpha, gamma, c, v=1.0) for gamma in range(1, MAX_GAMMA + 1))


def choose_draft(
    acceptance: Mapping[str, float],
    costs: Costs,
    *,
    verifier: str = "block",
    least: float = LEAST_SPEEDUP,
) -> DraftPlan | None:
    """Return the best draft and gamma; None if plain decoding should be as fast.

    Args:
        acceptance: each member's chance that one drafted token is kept, by name.
        costs: of the target and of these members.
        verifier: verifies their tokens.
        least: the smallest predicted speed-up that is worth it.

    >>> costs = Costs({1: 1.0, 2: 1.1, 3: 1.2}, {"S": 0.2, "L": 0.6})
    >>> best = choose_draft({"S": 0.8, "L": 0.9}, costs)
    >>> str(best.spec), best.gamma, round(best.speed.predicted, 3)
    ('S', 2, 1.525)
    >>> choose_draft({"S": 0.1, "L": 0.1}, costs) is None
    True
    """
    one = costs.target[1]
    speeds = {
        (name, m - 1): speedup(alpha, m - 1, costs.drafts[name] / one, seconds / one)
        for name, alpha in acceptance.items()
        for m, seconds in costs.target.items()
        if m > 1
    }
    best = max(speeds, key=speeds.__getitem__, default=None)
    if best is None or speeds[best] < least:
        return None
    name, gamma = best
    return DraftPlan(spec=DraftSpec(member=name), gamma=gamma, verifier=verifier, speed=Speed(speeds[best]))


def known_acceptance(
    members: Iterable[Member], params: SamplingParams, verifier: str = "block"
) -> dict[str, float]:
    """Return the acceptance of each measured member by name, the full model left out.

    A greedy draft is kept where its token is the full model's, so `match` tells; otherwise `alpha`, of
    which `coupled` guarantees alpha / (2 - alpha) only.
    """
    known = {}
    for member in members:
        acceptance = member.alpha if not params.is_greedy or member.match is None else member.match / 100
        if acceptance is None or member.granularity == "full" or not math.isfinite(acceptance):
            continue
        acceptance = min(acceptance, 1.0)
        is_coupled = verifier == COUPLED and not params.is_greedy
        known[member.name] = acceptance / (2 - acceptance) if is_coupled else acceptance
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
    """Return the number of threads, up to `most`, that this model's passes on a few tokens run best with."""
    cache = filled_cache(model, MAX_GAMMA + 1)
    passes = [one_pass(model, cache, m) for m in {1, min(4, cache.num_positions - cache.length)}]

    def work() -> None:
        for one in passes:
            one()

    return _fastest(work, most)


def best_num_threads_of_layers(model: ElasticLM, most: int) -> int:
    """Return the number of threads, up to `most`, that passes through these layers alone run best with."""
    count = min(4, model.config.max_position_embeddings)
    cache, x_TD = model.new_cache(count), torch.zeros(count, model.config.hidden_size)

    @torch.inference_mode()
    def work() -> None:
        for m in {1, count}:
            model.run_layers(x_TD[:m], cache, m)

    return _fastest(work, most)


def _fastest(work: Callable[[], None], most: int) -> int:
    return fastest_threads({"": work}, thread_counts(most), budget=TIMING_BUDGET / 2)[""]
