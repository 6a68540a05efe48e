"""A request to the engine: one prompt with its settings and all that decoding it keeps."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from models.base.errors import UsageError
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.logprobs import Logprobs
from models.decode.engine.policy import Policy
from models.decode.engine.report import Report
from models.decode.engine.state import State
from models.decode.sampling.rng import Random
from models.decode.sampling.samplers import Sampler, make_sampler
from models.elastic.cache import KVCache
from models.elastic.view import Model


@dataclass(frozen=True, kw_only=True)
class DecodingRequest:
    """One prompt and its continuation; see `new_request`."""

    target: Model
    policy: Policy
    sampler: Sampler
    limit: int
    """The most tokens to write."""
    eos_token_ids: frozenset[int]
    state: State
    report: Report
    prefill_chunk: int | None = None
    """The most tokens of the prompt that one pass reads; None reads all at once."""
    logprobs: int | None = None
    """Number of likeliest tokens whose log-probabilities come with each token; None gives no
    log-probabilities at all."""
    prompt_logprobs: list[Logprobs] | None = field(default=None)
    """Filled with those of the prompt's tokens but the first, if it is a list."""


def new_request(
    target: Model,
    prompt_ids: Sequence[int],
    policy: Policy,
    random: Random,
    config: GenerationConfig,
    *,
    cache: KVCache | None = None,
    prefill_chunk: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: list[Logprobs] | None = None,
) -> DecodingRequest:
    """Return a request that the engine can decode.

    Args:
        target: the model whose distribution the output follows.
        prompt_ids: at least one token.
        policy: decides round by round.
        random: the random choices.
        config: its settings; stop strings are for `models.decode.text`.
        cache: holds the keys and values of the prompt's first tokens, but not of its last; None holds none.
        prefill_chunk: see `DecodingRequest`, like the next two.
        logprobs: how many.
        prompt_logprobs: an empty list.

    Raises:
        UsageError: if the prompt leaves no room in the context, the draft does not fit the target,
            or a number makes no sense.
    """
    limit = num_new_tokens(target, len(prompt_ids), config)
    policy.check(target)
    eos_token_ids = config.end_tokens
    if eos_token_ids is None:
        eos_token_ids = target.full.config.eos_token_ids
    else:
        _check_end_tokens(eos_token_ids, target.full.config.vocab_size)
    if cache is None:
        cache = target.full.new_cache(len(prompt_ids) + limit)
    assert cache.length < len(prompt_ids), (cache.length, len(prompt_ids))
    return DecodingRequest(
        target=target,
        policy=policy,
        sampler=make_sampler(config.params, random, config.verifier),
        limit=limit,
        eos_token_ids=frozenset(eos_token_ids),
        state=State(list(prompt_ids), cache),
        report=Report(kv_bytes=cache.num_bytes, known_costs=policy.costs),
        prefill_chunk=prefill_chunk,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def num_new_tokens(target: Model, num_prompt_tokens: int, config: GenerationConfig) -> int:
    """Return the most tokens that may follow a prompt.

    Raises:
        UsageError: if there is no prompt, or no room for a token after it.
    """
    context = target.full.config.max_position_embeddings
    if not num_prompt_tokens:
        raise UsageError("--prompt is empty: give at least one token to continue")
    if num_prompt_tokens >= context:
        raise UsageError(
            f"--prompt has {num_prompt_tokens} tokens, but the model's context holds {context} and "
            f"needs room for a new one: shorten the prompt to at most {context - 1} tokens"
        )
    num_new = config.max_new_tokens
    if config.max_length is not None:
        num_new = config.max_length - num_prompt_tokens
        if num_new < 1:
            raise UsageError(
                f"max_length={config.max_length} counts the prompt, which has {num_prompt_tokens} tokens; "
                f"give at least {num_prompt_tokens + 1}, or max_new_tokens"
            )
    return min(num_new, context - num_prompt_tokens)


def _check_end_tokens(eos_token_ids: Collection[int], vocab_size: int) -> None:
    for token in eos_token_ids:
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"eos_token_id={token} is no token of the model; give one from 0 to {vocab_size - 1}, or ()"
            )
