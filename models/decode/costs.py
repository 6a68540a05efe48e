"""What a round of decoding costs here, part by part: the target's pass, a draft's step, the host's share.

A round that drafts gamma tokens takes

    gamma steps of the draft + a target pass on gamma + 1 tokens + what the host does with the logits

The host's share is what the speed-up formula of speculative decoding leaves out: to make laws of
logits, to draw, to compare and to reach a verdict. It depends on the law and the verifier and on the
vocabulary, not on the draft, and is timed by itself, through the choosers that decoding uses.

Times are medians of a few runs in turn: decoding pays the typical price, and the luckiest run of a small
draft is luckier than that of a large target. A plain pass is one of many in a row, as in decoding: where the
weights just fit into the caches it takes ten of them to get there, and another kind of pass drives them out.

V vocabulary, T tokens of a pass.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from models.cache import KVCache
from models.decode.chance import SeededRandom
from models.decode.choose import Proposal, draft_all, make_chooser
from models.decode.sampling import SamplingParams
from models.decode.state import Scorer, new_cache, score
from models.elastic import ElasticLM
from models.probe import Clock, Work, alternate

PLAIN_PASSES = 8
"""In a row, after as many that are not timed."""
NUM_POSITIONS = 64
"""Committed while timing: about the middle of a short text."""
HOST_GAMMAS = (0, 1, 4, 16)
SPREAD = 3.0  # of the logits: laws neither flat nor certain


@dataclass(frozen=True)
class HostCosts:
    """Seconds to choose gamma drafted tokens and to judge them, for some gammas."""

    seconds: Mapping[int, float]

    def __call__(self, gamma: int) -> float:
        """Seconds for any gamma; beyond the largest one measured along the last slope.

        >>> HostCosts({0: 1.0, 1: 2.0, 4: 8.0})(2), HostCosts({0: 1.0, 1: 2.0, 4: 8.0})(6)
        (4.0, 12.0)
        """
        gammas, values = zip(*sorted(self.seconds.items()), strict=True)
        if gamma > gammas[-1]:
            slope = (values[-1] - values[-2]) / (gammas[-1] - gammas[-2])
            return float(values[-1] + slope * (gamma - gammas[-1]))
        return float(np.interp(gamma, gammas, values))


def time_target(target: ElasticLM, most_tokens: int, *, budget: float, clock: Clock) -> dict[int, float]:
    """Seconds of a pass on 1, 2, ... tokens, as far as the context has room."""
    cache = filled_cache(target, most_tokens)
    tokens = range(1, cache.num_positions - cache.length + 1)
    cells = {m: one_pass(target, cache, m) for m in tokens} | {1: _plain(target, cache)}
    seconds = alternate(cells, budget=budget, clock=clock, settled=True).median
    return seconds | {1: seconds[1] / PLAIN_PASSES}


def time_drafts(
    target: ElasticLM,
    drafts: Mapping[str, Scorer],
    *,
    num_steps: int,
    goes_on: bool,
    budget: float,
    clock: Clock,
) -> dict[str, float]:
    """The cost of a step of each draft, in target passes on one token timed beside them.

    Timed is a whole round, and the target's pass is taken off: as in decoding, a draft's first step finds
    the target's weights, and not its own, in the processor's caches.

    Args:
        target: what judges.
        drafts: by name.
        num_steps: of a round.
        goes_on: whether they are one pass that goes on by itself, as greedy drafts are.
        budget: seconds.
        clock: tells seconds.
    """
    cache = filled_cache(target, num_steps + 1)
    num_steps = min(num_steps, cache.num_positions - cache.length - 1)
    verdict = one_pass(target, cache, num_steps + 1)
    cells: dict[tuple[str, str], Work] = {
        ("", "plain"): _plain(target, cache),
        ("", "verdict"): verdict,
    }
    at_once = num_steps if goes_on else 1
    cells |= {
        (name, "round"): _round(draft, cache, num_steps, at_once, verdict) for name, draft in drafts.items()
    }
    seconds = alternate(cells, budget=budget, clock=clock, settled=True).median
    one, last = seconds["", "plain"] / PLAIN_PASSES, seconds["", "verdict"]
    return {name: max(0.0, seconds[name, "round"] - last) / num_steps / one for name in drafts}


def time_hosts(
    target: ElasticLM,
    kinds: Iterable[tuple[SamplingParams, str]],
    *,
    budget: float,
    clock: Clock,
) -> dict[tuple[SamplingParams, str], HostCosts]:
    """For each (law, verifier) the host's share of a round; the logits are noise."""
    kinds = list(kinds)
    seeds = itertools.count()
    cells = {
        (kind, gamma): _choices(target, *kind, gamma, seeds.__next__)
        for kind in kinds
        for gamma in HOST_GAMMAS
    }
    seconds = alternate(cells, budget=budget, clock=clock).median
    return {kind: HostCosts({gamma: seconds[kind, gamma] for gamma in HOST_GAMMAS}) for kind in kinds}


def filled_cache(target: ElasticLM, num_tokens: int) -> KVCache:
    """A cache as in the middle of a text, with room for so many tokens or as many as the context has."""
    context = target.config.max_position_embeddings
    num_tokens = min(num_tokens, context)
    cache = new_cache(target, min(NUM_POSITIONS + num_tokens, context))
    cache.commit(cache.num_positions - num_tokens)
    return cache


def one_pass(model: Scorer, cache: KVCache, num_tokens: int) -> Work:
    """A pass on so many tokens, until its logits are there."""

    @torch.inference_mode()
    def work() -> None:
        logits_TV = score(model, [0] * num_tokens, cache, num_last=num_tokens)
        logits_TV[-1, 0].item()  # a GPU has only been told so far

    return work


def _plain(model: Scorer, cache: KVCache) -> Work:
    one = one_pass(model, cache, 1)

    def work() -> None:
        for _ in range(PLAIN_PASSES):
            one()

    return work


def _round(model: Scorer, cache: KVCache, num_steps: int, at_once: int, verdict: Work) -> Work:
    @torch.inference_mode()
    def work() -> None:
        tail = cache.view()
        for _ in range(0, num_steps, at_once):
            score(model, [0], tail, num_last=1, num_next=at_once - 1)[-1, 0].item()
            tail.commit(at_once)
        verdict()

    return work


def _choices(
    target: ElasticLM, params: SamplingParams, verifier: str, gamma: int, new_seed: Callable[[], int]
) -> Work:
    """Choose and judge a proposal; every time with new random numbers, which may be kept for a seed."""
    logits_TV = (torch.randn(gamma + 1, target.config.vocab_size) * SPREAD).to(target.lm_head.weight)
    prefix = [0] * NUM_POSITIONS

    @torch.inference_mode()
    def work() -> None:
        chooser = make_chooser(params, SeededRandom(new_seed()), verifier)
        proposal = Proposal(prefix)
        draft_all(chooser, logits_TV[:gamma], proposal)
        chooser.verify(logits_TV, proposal)

    return work
