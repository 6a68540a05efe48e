"""A draft and its target as two models of their own: how often a drafted token is kept, and what it costs.

An extracted draft has its own keys and values, unlike a draft in place. Engines keep tokens by their rules:

    greedy             the draft's likeliest token is the target's
    sampled            rejection sampling: sum of min(p, q)
    sample_and_match   the draft's likeliest token is what the target draws: p(argmax q)

N positions, V vocabulary; p the target, q the draft.
"""

import time
from dataclasses import dataclass

import torch

from models.base.stopwatch import Work, alternate
from models.decode.tune.predict import MAX_GAMMA, speedup
from models.decode.tune.timing import PLAIN_PASSES, filled_cache, one_pass, plain_passes, rising
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.consistency import draft_states
from models.measure.perplexity import Batches, check_some, exact_logits, row_chunks, select_valid

BUDGET = 2.0
"""Seconds that timing may take."""


@dataclass(frozen=True, kw_only=True)
class PairCosts:
    """Costs in plain tokens of the target: `c` a drafted token, `v` a target pass by its number of tokens."""

    c: float
    v: dict[int, float]

    def best(self, alpha: float) -> tuple[int, float]:
        """Return the best number of drafted tokens, and how many times as fast as plain decoding it is."""
        speeds = {
            num_tokens - 1: speedup(alpha, num_tokens - 1, self.c, cost)
            for num_tokens, cost in self.v.items()
            if num_tokens > 1
        }
        best = max(speeds, key=speeds.__getitem__)
        return best, speeds[best]

    def break_even(self) -> float | None:
        """Return the least acceptance with which some round is as fast as plain decoding; None if none is."""
        low, high = 0.0, 1.0
        if self.best(1.0)[1] < 1:
            return None
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if self.best(middle)[1] >= 1 else (middle, high)
        return high


@torch.no_grad()
def measure_kept(
    model: ElasticLM, target: Granularity, draft: Granularity, batches: Batches
) -> dict[str, float]:
    """Return rule -> the chance that a drafted token is kept, a mean over the text's positions.

    Raises:
        NestlingError: if no position has a label.
    """
    views = [View(model, target), View(model, draft)]
    sums = dict.fromkeys(("greedy", "sampled", "sample_and_match"), 0.0)
    num_tokens = 0
    for tokens_BT, labels_BT in batches:
        states = draft_states(model, views, tokens_BT.to(model.device), shared_block=None)[1:]
        labels_N, (p_ND, q_ND) = select_valid(labels_BT.to(model.device), states)
        for rows in row_chunks(len(labels_N), model.config.vocab_size):
            pairs = zip(views, (p_ND, q_ND), strict=True)
            p_NV, q_NV = (exact_logits(view, one_ND[rows]).softmax(-1) for view, one_ND in pairs)
            likeliest_N = q_NV.argmax(-1)
            sums["greedy"] += float((p_NV.argmax(-1) == likeliest_N).sum())
            sums["sampled"] += float(torch.minimum(p_NV, q_NV).sum())
            sums["sample_and_match"] += float(p_NV.gather(1, likeliest_N[:, None]).sum())
        num_tokens += len(labels_N)
    return {rule: total / check_some(num_tokens) for rule, total in sums.items()}


def measure_pair_costs(model: ElasticLM, target: Granularity, draft: Granularity) -> PairCosts:
    """Time both on this machine.

    Args:
        model: the family, packed as it decodes.
        target: a member of it.
        draft: another one.
    """
    cache = filled_cache(model, MAX_GAMMA + 1)
    counts = range(2, cache.num_positions - cache.length + 1)
    cells: dict[str | int, Work] = {name: one_pass(View(model, target), cache, name) for name in counts}
    cells["target"] = plain_passes(View(model, target), cache)
    cells["draft"] = plain_passes(View(model, draft), filled_cache(model, 1))
    seconds = alternate(cells, budget=BUDGET, clock=time.perf_counter, before=cells).median
    one = seconds["target"] / PLAIN_PASSES
    costs = rising(max(1.0, seconds[count] / one) for count in counts)
    v = {1: 1.0} | dict(zip(counts, costs, strict=True))
    return PairCosts(c=seconds["draft"] / PLAIN_PASSES / one, v=v)
