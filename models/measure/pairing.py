"""A draft and its target as two models of their own: how often a drafted token is kept, and what it costs.

An extracted draft has its own keys and values, unlike a draft in place. Engines keep tokens by their rules:

    greedy             the draft's likeliest token is the target's
    sampled            rejection sampling: sum of min(p, q)
    sample_and_match   the draft's likeliest token is what the target draws: p(argmax q)

N positions, V vocabulary; p the target, q the draft.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from models.base.stopwatch import Clock, Work, alternate
from models.decode.tune.predict import MAX_GAMMA, speedup
from models.decode.tune.timing import PLAIN_PASSES, filled_cache, one_pass, plain_passes, rising
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.perplexity import Batches, check_some, exact_logits, row_chunks, select_valid

RULES = ("greedy", "sampled", "sample_and_match")
MEASURES = (*RULES, "kl")
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


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over the positions of a text, and its standard error."""

    mean: float
    error: float


@torch.no_grad()
def compare_models(target: View, draft: View, batches: Batches) -> dict[str, Estimate]:
    """Compare two models of one vocabulary.

    Returns:
        By rule the chance that a drafted token is kept; and `kl`, KL(p, q) in nats per token.

    Raises:
        NestlingError: if no position has a label.
    """
    parts: list[Tensor] = []
    for tokens_BT, labels_BT in batches:
        states = [
            view.model.states(tokens_BT.to(view.device), view.granularity)[-1] for view in (target, draft)
        ]
        labels_N, (p_ND, q_ND) = select_valid(labels_BT.to(target.device), states)
        for rows in row_chunks(len(labels_N), target.model.config.vocab_size):
            log_p_NV, log_q_NV = (
                exact_logits(view, one_ND[rows]).log_softmax(-1)
                for view, one_ND in ((target, p_ND), (draft, q_ND))
            )
            parts.append(_compare(log_p_NV, log_q_NV))
    values_QN = torch.cat(parts, 1) if parts else torch.zeros(len(MEASURES), 0)
    num_tokens = check_some(values_QN.shape[1])
    spread_Q = values_QN.std(1) if num_tokens > 1 else torch.zeros(len(MEASURES))
    return {
        name: Estimate(mean=float(mean), error=float(spread) / math.sqrt(num_tokens))
        for name, mean, spread in zip(MEASURES, values_QN.mean(1), spread_Q, strict=True)
    }


def _compare(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Return each of `MEASURES` at each position, [4, N]."""
    p_NV, likeliest_N = log_p_NV.exp(), log_q_NV.argmax(-1)
    # A token that p never gives adds nothing, though its log-ratio may be infinite or undefined.
    ratio_NV = (log_p_NV - log_q_NV).masked_fill_(p_NV == 0, 0.0)
    values = [
        (log_p_NV.argmax(-1) == likeliest_N).to(p_NV.dtype),
        torch.minimum(p_NV, log_q_NV.exp()).sum(-1).clamp(max=1.0),
        p_NV.gather(1, likeliest_N[:, None])[:, 0],
        (p_NV * ratio_NV).sum(-1).clamp(min=0.0),  # rounding can leave it a hair below zero
    ]
    return torch.stack(values).double().cpu()


def measure_pair_costs(
    model: ElasticLM, target: Granularity, draft: Granularity, clock: Clock = time.perf_counter
) -> PairCosts:
    """Time both on this machine.

    Args:
        model: the family, packed as it decodes.
        target: a member of it.
        draft: another one.
        clock: returns the time in seconds; on a busy machine that of the thread, which then must be one.
    """
    cache = filled_cache(model, MAX_GAMMA + 1)
    counts = range(2, cache.num_positions - cache.length + 1)
    cells: dict[str | int, Work] = {name: one_pass(View(model, target), cache, name) for name in counts}
    cells["target"] = plain_passes(View(model, target), cache)
    cells["draft"] = plain_passes(View(model, draft), filled_cache(model, 1))
    seconds = alternate(cells, budget=BUDGET, clock=clock, before=cells).median
    one = seconds["target"] / PLAIN_PASSES
    costs = rising(max(1.0, seconds[count] / one) for count in counts)
    v = {1: 1.0} | dict(zip(counts, costs, strict=True))
    return PairCosts(c=seconds["draft"] / PLAIN_PASSES / one, v=v)
