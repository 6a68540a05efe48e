"""Times the parts of a round of decoding: drafted tokens, the target's pass, and what the host does besides.

The host turns the target's logits into probabilities, compares, draws and keeps the books, which the speed-up
formula of speculative decoding leaves out. That depends on the sampling, the verifier and the vocabulary, not
on the draft. Drafted tokens are timed with the choice of each, as decoding makes it: in the pass or after it.

Times are medians of a few runs in turn: decoding pays the typical price, and the luckiest run of a small
draft is luckier than that of a large target. Each part is timed after the one that comes before it in
decoding: weights and programs that a pass has driven out of the processor's caches are not there. A
plain pass is one of many in a row: where the weights just fit into the caches it takes ten to get there.

V vocabulary, T tokens of a pass.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from models.base.stopwatch import Clock, Work, alternate
from models.decode.engine.costs import DraftCosts, HostCosts
from models.decode.engine.draft import propose
from models.decode.engine.engine import Token, stream
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.scheduler import run_steps
from models.decode.engine.state import State
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import Proposal, make_sampler
from models.elastic.cache import KVCache
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import Model, Scorer

PLAIN_PASSES = 8
"""Plain passes in a row that are timed, after as many that are not."""
NUM_POSITIONS = 64
"""Committed positions while timing: about the middle of a short text."""
HOST_GAMMAS = (0, 1, 4, 16)
MOST_DRAFTED = 8
"""Drafted tokens in the longest round that is timed."""
SPREAD = 3.0  # of the logits: distributions neither flat nor certain


def time_target(target: ElasticLM, most_tokens: int, *, budget: float, clock: Clock) -> dict[int, float]:
    """Return the seconds of a pass on 1, 2, ... tokens that the context has room for; they never fall."""
    cache = filled_cache(target, most_tokens)
    tokens = range(1, cache.num_positions - cache.length + 1)
    cells = {m: one_pass(target, cache, m) for m in tokens} | {1: plain_passes(target, cache)}
    seconds = alternate(cells, budget=budget, clock=clock, before=cells).median
    one = seconds.pop(1) / PLAIN_PASSES
    return {1: one} | dict(zip(seconds, rising(seconds.values()), strict=True))


def rising(values: Iterable[float]) -> list[float]:
    """Return the nearest numbers, by least squares, that never fall: one busy moment does not bend them.

    Neighbours that fall are pooled into their mean.

    >>> rising([1.0, 4.0, 2.0, 3.0, 5.0])
    [1.0, 3.0, 3.0, 3.0, 5.0]
    """
    pools: list[tuple[float, int]] = []  # the mean, and of how many
    for value in values:
        count = 1
        while pools and pools[-1][0] > value:
            mean, others = pools.pop()
            value, count = (value * count + mean * others) / (count + others), count + others
        pools.append((value, count))
    return [mean for mean, count in pools for _ in range(count)]


def time_drafts(
    target: ElasticLM,
    drafts: Mapping[str, Scorer],
    params: SamplingParams,
    verifier: str = "block",
    *,
    budget: float,
    clock: Clock,
) -> dict[str, DraftCosts]:
    """Return the cost of a drafted token of each draft, its choice included, among the target's passes.

    Timed are one token and several, each time after a pass of the target.

    Args:
        target: verifies their tokens.
        drafts: drafts by name.
        params: settings of sampling.
        verifier: see `make_sampler`.
        budget: seconds.
        clock: returns the time in seconds.
    """
    cache = filled_cache(target, MOST_DRAFTED + 1)
    most = min(MOST_DRAFTED, cache.num_positions - cache.length - 1)
    seeds = itertools.count()  # the noise of a seed may be kept
    verifications = {gamma: one_pass(target, cache, gamma + 1) for gamma in (1, most)}
    cells: dict[tuple[str, int], Work] = {("", 0): plain_passes(target, cache)}
    before = dict(cells)
    for name, draft in drafts.items():
        for gamma in (1, most):
            cells[name, gamma] = _proposal(draft, cache, gamma, params, verifier, seeds.__next__)
            before[name, gamma] = verifications[gamma]
    seconds = alternate(cells, budget=budget, clock=clock, before=before).median
    one = seconds["", 0] / PLAIN_PASSES
    found = {}
    for name in drafts:
        first, all_of_them = seconds[name, 1] / one, seconds[name, most] / one
        more = max(0.0, all_of_them - first) / (most - 1) if most > 1 else first
        found[name] = DraftCosts(first, more)
    return found


def time_hosts(
    target: ElasticLM,
    kinds: Iterable[tuple[SamplingParams, str]],
    *,
    budget: float,
    clock: Clock,
) -> dict[tuple[SamplingParams, str], HostCosts]:
    """Return what the host takes in a round after the target's pass, by (params, verifier)."""
    kinds = list(kinds)
    cache = filled_cache(target, max(HOST_GAMMAS) + 1)
    gammas = [gamma for gamma in HOST_GAMMAS if gamma < cache.num_positions - cache.length]
    cells: dict[Any, Work] = {"pass": plain_passes(target, cache)}
    before = dict(cells)
    for params, verifier in kinds:
        plain = PlainDecoding(target, params, verifier)
        cells[params, verifier], before[params, verifier] = plain.go_on, plain.begin
        for gamma in gammas:
            cells[params, verifier, gamma] = _verification(target, params, verifier, gamma)
            before[params, verifier, gamma] = one_pass(target, cache, gamma + 1)
    seconds = alternate(cells, budget=budget, clock=clock, before=before).median
    found = {}
    for kind in kinds:
        # What a plain token takes besides its pass and verification, any round does.
        rest = (seconds[kind] - seconds["pass"]) / PLAIN_PASSES - seconds[*kind, 0]
        found[kind] = HostCosts({gamma: seconds[*kind, gamma] + max(0.0, rest) for gamma in gammas})
    return found


def filled_cache(target: ElasticLM, num_tokens: int) -> KVCache:
    """Return a cache as in the middle of a text, with room for `num_tokens` tokens or all of the context."""
    context = target.config.max_position_embeddings
    num_tokens = min(num_tokens, context)
    cache = target.new_cache(min(NUM_POSITIONS + num_tokens, context))
    cache.commit(cache.num_positions - num_tokens)
    return cache


def one_pass(model: Scorer, cache: KVCache, num_tokens: int) -> Work:
    """Return the work of a pass on `num_tokens` tokens, until its logits are there."""

    @torch.inference_mode()
    def work() -> None:
        logits_TV = model.run([Request([0] * num_tokens, cache, num_tokens)])
        logits_TV[-1, 0].item()  # a GPU has only been told so far

    return work


def plain_passes(model: Scorer, cache: KVCache) -> Work:
    """Return the work of `PLAIN_PASSES` passes on one token, one after the other."""
    one = one_pass(model, cache, 1)

    def work() -> None:
        for _ in range(PLAIN_PASSES):
            one()

    return work


def _proposal(
    draft: Scorer,
    cache: KVCache,
    num_tokens: int,
    params: SamplingParams,
    verifier: str,
    new_seed: Callable[[], int],
) -> Work:
    """Return the work of drafting `num_tokens` tokens, every time by other random numbers."""
    state = State([0] * (cache.length + 1), cache)

    def work() -> None:
        sampler = make_sampler(params, SeededRandom(new_seed()), verifier)
        run_steps(propose(draft, state, cache.view(), num_tokens, sampler))

    return work


class PlainDecoding:
    """The engine itself without a draft, some tokens into a text.

    Args:
        target: the model, or a member in place.
        params: settings of sampling.
        verifier: see `make_sampler`.
        num_prompt: tokens of the text before.
    """

    def __init__(
        self,
        target: Model,
        params: SamplingParams,
        verifier: str = "block",
        *,
        num_prompt: int = NUM_POSITIONS,
    ) -> None:
        self.target, self.num_prompt = target, num_prompt
        self.config = GenerationConfig(params=params, verifier=verifier, eos_token_ids=())
        self.tokens: Iterator[Token] = iter(())

    def begin(self) -> None:
        """Read the prompt anew, and decode until the caches are as decoding leaves them."""
        context = self.target.full.config.max_position_embeddings
        prompt_ids = [0] * max(1, min(self.num_prompt, context - 2 * PLAIN_PASSES - 1))
        self.tokens = stream(self.target, prompt_ids, self.config)
        for _ in range(1 + PLAIN_PASSES):
            next(self.tokens, None)

    def go_on(self) -> None:
        """Decode `PLAIN_PASSES` tokens."""
        for _ in range(PLAIN_PASSES):
            next(self.tokens, None)


def _verification(target: ElasticLM, params: SamplingParams, verifier: str, gamma: int) -> Work:
    """Verify a proposal, each time one position further on: the noise of all others is there by then."""
    logits_TV = (torch.randn(gamma + 1, target.config.vocab_size) * SPREAD).to(target.lm_head.weight)
    sampler = make_sampler(params, SeededRandom(0), verifier)
    drafted = Proposal([0] * NUM_POSITIONS)
    with torch.inference_mode():
        for logits_V in logits_TV[:gamma]:
            sampler.draft(logits_V, drafted)
    prefix = [0] * NUM_POSITIONS

    @torch.inference_mode()
    def work() -> None:
        prefix.append(0)
        sampler.verify(logits_TV, Proposal(prefix, drafted.ids, drafted.probs))

    return work
