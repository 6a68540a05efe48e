"""The decoding engine: plain and speculative are one loop, and plain is the one without a draft.

    prefill   the target reads the prompt; its last logits give the first token
    choose    a policy says who drafts this round and how many tokens gamma (models/decode/engine/policy.py)
    propose   the draft proposes up to gamma tokens after the pending one
    verify    the target scores [pending, d1 .. d_gamma] in one pass, which decides which of them stay
    commit    what stays is committed: the cache's length grows, nothing is copied or cropped

A step asks for its passes and is sent their logits (models/decode/engine/scheduler.py), so that one request
runs alone, and many share their passes, by the same code. The output follows the target's distribution
whatever the draft is (https://arxiv.org/abs/2211.17192, https://arxiv.org/abs/2302.01318). Greedy output
equals plain decoding's token by token.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor

from models.base.errors import NestlingError
from models.decode.engine.draft import Draft
from models.decode.engine.generation_config import DEFAULT, GenerationConfig
from models.decode.engine.logprobs import Logprobs, logprobs_of
from models.decode.engine.policy import NO_DRAFT, Fixed, Policy, Round, RoundPlan
from models.decode.engine.report import Report
from models.decode.engine.request import DecodingRequest, new_request
from models.decode.engine.scheduler import BatchScheduler, Events, Pass, Steps, run_sequentially
from models.decode.sampling.rng import Random, SeededRandom
from models.decode.sampling.samplers import Proposal, Verification
from models.elastic.view import Model


class Token(NamedTuple):
    """One token of the output."""

    id: int
    drafted: bool
    """True if the draft proposed it."""
    logprobs: Logprobs | None = None
    """If the request asks for them."""


class Committed(NamedTuple):
    """A token, and what the report needs to know of it once it is taken."""

    token: Token
    position: int
    """Its position in the round."""
    finish_reason: str


class Stream(Iterator[Token]):
    """Tokens as they are decided, a round at a time; to cancel, stop taking them, or `close` it."""

    def __init__(self, committed: Iterator[Committed], report: Report, cancel: Callable[[], None]) -> None:
        self._committed = committed
        self.report = report
        self._cancel = cancel

    def __next__(self) -> Token:
        """Return the next token; the report already counts it."""
        token, position, finish_reason = next(self._committed)
        self.report.count_token(position if token.drafted else None)
        self.report.finish_reason = finish_reason
        return token

    def close(self) -> None:
        """Decode no further; a batch goes on without this request."""
        self._cancel()
        self._committed = iter(())


def stream(
    target: Model,
    prompt_ids: Sequence[int],
    config: GenerationConfig = DEFAULT,
    *,
    draft: Draft | None = None,
    gamma: int = 4,
    policy: Policy | None = None,
    random: Random | None = None,
    **changes: Any,
) -> Stream:
    """Decode one prompt.

    Args:
        target: the model whose distribution the output follows.
        prompt_ids: at least one token.
        config: its settings; stop strings are for `models.decode.text`.
        draft: what proposes tokens; None decodes plainly.
        gamma: drafted tokens a round.
        policy: decides round by round instead of `draft` and `gamma`; one that learns serves one request.
        random: the random choices; None is `SeededRandom` of the config's seed.
        changes: fields of the config that are other than there.

    Raises:
        UsageError: if the prompt leaves no room in the context, the draft does not fit the target,
            or a number makes no sense.
    """
    config = replace(config, **changes)
    random = random or SeededRandom(config.seed)
    request = new_request(target, prompt_ids, policy or Fixed(draft, gamma), random, config)
    events = decode(request)
    return Stream(run_sequentially(events), request.report, events.close)


def stream_batch(
    target: Model,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig = DEFAULT,
    *,
    new_policy: Callable[[], Policy] = lambda: Fixed(None, 0),
    randoms: Sequence[Random] | None = None,
    **changes: Any,
) -> list[Stream]:
    """Decode several prompts, whose passes share the reading of the weights.

    The streams may be taken in any order, best in turn: taking from one lets all go on. Each gives what
    it would give alone, apart from the rounding of products with more rows: it has a cache, random
    choices and a policy of its own.

    Args:
        target: the model, as in `stream`.
        prompts: token ids of each.
        config: settings of each.
        new_policy: called for each prompt; drafts that remember a text must not be shared.
        randoms: the random choices of each; None is `SeededRandom(seed, row)`.
        changes: fields of the config that are other than there.

    Raises:
        UsageError: as `stream`, for any of the prompts.
    """
    config = replace(config, **changes)
    randoms = randoms or [SeededRandom(config.seed, row) for row in range(len(prompts))]
    requests = [
        new_request(target, prompt_ids, new_policy(), random, config)
        for prompt_ids, random in zip(prompts, randoms, strict=True)
    ]
    scheduler = BatchScheduler[Committed]()
    lines = [deque(scheduler.add(number, decode(request))) for number, request in enumerate(requests)]

    def taken(number: int) -> Iterator[Committed]:
        while True:
            while not lines[number] and len(scheduler):
                for owner, token in scheduler.step():
                    lines[owner].append(token)
            if not lines[number]:
                return
            yield lines[number].popleft()

    def cancel(number: int) -> Callable[[], None]:
        return lambda: scheduler.cancel(number)

    return [Stream(taken(row), one.report, cancel(row)) for row, one in enumerate(requests)]


def decode(request: DecodingRequest) -> Events[Committed]:
    """Decode a request: a coroutine that yields its passes and each round's tokens."""
    report, room = request.report, request.limit
    started = perf_counter()
    kept = yield from prefill(request)
    report.prefill_seconds = perf_counter() - started
    while True:
        room -= len(kept)
        ended = "eos" if kept[-1].id in request.eos_token_ids else "length" if room == 0 else ""
        *first, last = (Committed(token, position, "") for position, token in enumerate(kept))
        yield [*first, last._replace(finish_reason=ended)]
        if ended:
            return
        started = perf_counter()
        # A round gives one token more than it drafts at most: this also keeps it inside the cache.
        plan = request.policy.choose(request.state, room - 1)
        proposal = yield from propose(request, plan)
        drafted = perf_counter() if proposal.ids else started
        logits_TV = yield from score(request, proposal)
        verification = request.sampler.verify(logits_TV, proposal)
        kept = commit(request, verification, logits_TV)
        verified = perf_counter()
        done = Round(
            draft=plan.name if proposal.ids else NO_DRAFT,
            num_drafted=len(proposal.ids),
            num_accepted=sum(token.drafted for token in kept),
            draft_seconds=drafted - started,
            target_seconds=verified - drafted,
            overlaps=tuple(verification.overlaps[: len(kept)]),
        )
        request.policy.observe(done)
        report.count_round(done)
        report.decode_seconds += perf_counter() - started


def prefill(request: DecodingRequest) -> Steps[list[Token]]:
    """Read the prompt, but for what the cache holds already, and commit the first token."""
    state = request.state
    chunk, scores = request.prefill_chunk or len(state.ids), request.prompt_logprobs
    while True:
        start = state.cache.length
        ids = state.ids[start : start + chunk]
        logits_TV = yield Pass(request.target, ids, state.cache, num_last=1 if scores is None else len(ids))
        if scores is not None:
            followers = state.ids[start + 1 : start + len(ids) + 1]
            scores += logprobs_of(logits_TV, followers, request.logprobs or 0)
        if start + len(ids) == len(state.ids):
            break
        state.cache.commit(len(ids))
    logits_TV = logits_TV[-1:]
    if not bool((logits_TV < math.inf).all()):  # nan is not below infinity either
        raise NestlingError(
            "the model's logits are not numbers: its weights do not fit its config.json, or not this dtype; "
            "try --dtype fp32"
        )
    # commit() counts one position for each token kept; here the rest of the prompt comes on top.
    state.cache.commit(len(ids) - 1)
    return commit(request, request.sampler.verify(logits_TV, Proposal(state.ids)), logits_TV)


def propose(request: DecodingRequest, plan: RoundPlan) -> Steps[Proposal]:
    """Let the chosen draft propose tokens; none without a draft."""
    if plan.draft is None:
        return Proposal(request.state.ids)
    return (yield from plan.draft.propose(request.state, plan.gamma, request.sampler))


def score(request: DecodingRequest, proposal: Proposal) -> Steps[Tensor]:
    """Let the target score the pending token and the proposal in one pass.

    The pass writes the target's keys and values over whatever a draft left in the cache's tail.
    """
    state = request.state
    block = [state.ids[-1], *proposal.ids]
    return (yield Pass(request.target, block, state.cache, num_last=len(block)))


def commit(request: DecodingRequest, verification: Verification, logits_TV: Tensor) -> list[Token]:
    """Commit what was kept, up to the end of the text, and return it.

    The pending token and all kept ones but the last enter the cache; the last is pending now.
    """
    num_accepted = len(verification.kept) - 1
    tokens = []
    for position, token in enumerate(verification.kept):
        tokens.append(Token(token, drafted=position < num_accepted))
        if token in request.eos_token_ids:
            break
    request.state.cache.commit(len(tokens))
    ids = [token.id for token in tokens]
    request.state.ids += ids
    if request.logprobs is not None:
        each = logprobs_of(logits_TV, ids, request.logprobs)
        tokens = [token._replace(logprobs=one) for token, one in zip(tokens, each, strict=True)]
    return tokens
