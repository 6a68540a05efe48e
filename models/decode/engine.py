"""The decoding engine: plain and speculative are one loop, and plain is the one without a draft.

    prefill   the target reads the prompt; its last logits give the first token
    choose    a policy says who drafts this round and how many tokens gamma (models/decode/policy.py)
    propose   the draft proposes up to gamma tokens after the pending one
    verify    the target scores [pending, d1 .. d_gamma] in one pass and decides which of them stay
    commit    what stays is settled: the cache's length grows, nothing is copied or cropped

The output follows the target's law whatever the draft is (https://arxiv.org/abs/2211.17192,
https://arxiv.org/abs/2302.01318). Greedy output equals plain decoding's token by token.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, TypedDict

import torch

from models.decode.accept import Verifier
from models.decode.chance import Random, SeededRandom
from models.decode.choose import Chooser, Proposal, Verdict, make_chooser
from models.decode.draft import Draft
from models.decode.policy import NO_DRAFT, Fixed, Plan, Policy, Round
from models.decode.report import Report
from models.decode.sampling import SamplingParams
from models.decode.state import Model, State, elastic_model, new_cache, score
from models.errors import UsageError

GREEDY = SamplingParams()


class Token(NamedTuple):
    """One token of the output."""

    id: int
    drafted: bool
    """Whether the draft proposed it."""


class Options(TypedDict, total=False):
    """What `stream` takes besides the prompt and the random choices; see there."""

    draft: Draft | None
    gamma: int
    policy: Policy | None
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: Collection[int] | None
    verifier: str | Verifier


class Stream(Iterator[Token]):
    """Tokens as they are decided, a round at a time; to cancel, stop taking them."""

    def __init__(self, tokens: Iterator[Token], report: Report) -> None:
        self._tokens = tokens
        self.report = report

    def __next__(self) -> Token:
        """The next token; the report already counts it."""
        return next(self._tokens)


def stream(
    target: Model,
    prompt_ids: Sequence[int],
    *,
    draft: Draft | None = None,
    gamma: int = 4,
    policy: Policy | None = None,
    params: SamplingParams = GREEDY,
    max_new_tokens: int = 128,
    eos_token_ids: Collection[int] | None = None,
    random: Random | None = None,
    verifier: str | Verifier = "block",
) -> Stream:
    """Decode one prompt.

    Args:
        target: the model whose law the output follows.
        prompt_ids: at least one token.
        draft: what proposes tokens; None decodes plainly.
        gamma: drafted tokens a round.
        policy: decides round by round instead of `draft` and `gamma`; one that learns serves one request.
        params: how tokens are chosen.
        max_new_tokens: the most tokens to give; the context's end may come first.
        eos_token_ids: tokens that end the output (and are its last token); None means the model's.
        random: the random choices; None is `SeededRandom(0)`.
        verifier: `token`, `block`, `coupled` or a function like the first two; greedy decoding has no use
            for it.

    Raises:
        UsageError: if the prompt leaves no room in the context, the draft does not fit the target,
            or a number makes no sense.
    """
    limit = _num_new_tokens(target, prompt_ids, max_new_tokens)
    policy = policy or Fixed(draft, gamma)
    policy.check(target)
    if eos_token_ids is None:
        eos = elastic_model(target).config.eos_token_id
        eos_token_ids = () if eos is None else (eos,)
    request = _Request(
        target=target,
        policy=policy,
        chooser=make_chooser(params, random or SeededRandom(0), verifier),
        limit=limit,
        eos_token_ids=frozenset(eos_token_ids),
        state=State(list(prompt_ids), new_cache(target, len(prompt_ids) + limit)),
    )
    report = Report(kv_bytes=request.state.cache.num_bytes, known_costs=policy.costs)
    return Stream(_decode(request, report), report)


@dataclass(frozen=True, kw_only=True)
class _Request:
    target: Model
    policy: Policy
    chooser: Chooser
    limit: int
    eos_token_ids: frozenset[int]
    state: State


def _decode(request: _Request, report: Report) -> Iterator[Token]:
    started = perf_counter()
    kept = prefill(request)
    report.prefill_seconds = perf_counter() - started
    while True:
        for position, token in enumerate(kept):
            report.count_token(position if token.drafted else None)
            if token.id in request.eos_token_ids:
                report.finish_reason = "eos"
            elif report.num_tokens == request.limit:
                report.finish_reason = "length"
            yield token
        if report.finish_reason:
            return
        started = perf_counter()
        # A round gives one token more than it drafts at most: this also keeps it inside the cache.
        plan = request.policy.choose(request.state, request.limit - report.num_tokens - 1)
        proposal = propose(request, plan)
        drafted = perf_counter() if proposal.ids else started
        verdict = verify(request, proposal)
        kept = commit(request, verdict)
        verified = perf_counter()
        done = Round(
            draft=plan.name if proposal.ids else NO_DRAFT,
            num_drafted=len(proposal.ids),
            num_accepted=sum(token.drafted for token in kept),
            draft_seconds=drafted - started,
            target_seconds=verified - drafted,
            overlaps=tuple(verdict.overlaps[: len(kept)]),
        )
        request.policy.observe(done)
        report.count_round(done)
        report.decode_seconds += perf_counter() - started


@torch.inference_mode()
def prefill(request: _Request) -> list[Token]:
    """Read the prompt and settle the first token."""
    state = request.state
    logits_TV = score(request.target, state.ids, state.cache, num_last=1)
    # commit() counts one position for each token kept; here the rest of the prompt comes on top.
    state.cache.commit(len(state.ids) - 1)
    return commit(request, request.chooser.verify(logits_TV, Proposal(state.ids)))


@torch.inference_mode()
def propose(request: _Request, plan: Plan) -> Proposal:
    """Let the chosen draft propose tokens; none without a draft."""
    if plan.draft is None:
        return Proposal(request.state.ids)
    return plan.draft.propose(request.state, plan.gamma, request.chooser)


@torch.inference_mode()
def verify(request: _Request, proposal: Proposal) -> Verdict:
    """Score the pending token and the proposal in one pass, and decide what stays.

    The pass writes the target's keys and values over whatever a draft left in the cache's tail.
    """
    state = request.state
    block = [state.ids[-1], *proposal.ids]
    logits_TV = score(request.target, block, state.cache, num_last=len(block))
    return request.chooser.verify(logits_TV, proposal)


def commit(request: _Request, verdict: Verdict) -> list[Token]:
    """Settle what was kept, up to the end of the text, and return it.

    The pending token and all kept ones but the last enter the cache; the last is pending now.
    """
    num_accepted = len(verdict.kept) - 1
    tokens = []
    for position, token in enumerate(verdict.kept):
        tokens.append(Token(token, drafted=position < num_accepted))
        if token in request.eos_token_ids:
            break
    request.state.cache.commit(len(tokens))
    request.state.ids += [token.id for token in tokens]
    return tokens


def _num_new_tokens(target: Model, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
    context = elastic_model(target).config.max_position_embeddings
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if not prompt_ids:
        raise UsageError("--prompt is empty: give at least one token to continue")
    if len(prompt_ids) >= context:
        raise UsageError(
            f"--prompt has {len(prompt_ids)} tokens, but the model's context holds {context} and "
            f"needs room for a new one: shorten the prompt to at most {context - 1} tokens"
        )
    return min(max_new_tokens, context - len(prompt_ids))
