"""The slow, obvious decoders, for tests to compare to: no cache, a full pass for every distribution.

Leviathan et al. (https://arxiv.org/abs/2211.17192), algorithm 1, written down as it stands there.
p target, q draft; V vocabulary.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from models.decode.sampling.params import SamplingParams, sampling_probs
from models.decode.sampling.rng import Random
from models.elastic.view import Model

NextProbs = Callable[[list[int]], Tensor]
"""Tokens so far -> the distribution [V] of the next one."""


def full_pass_probs(model: Model, params: SamplingParams) -> NextProbs:
    """Return the distribution of the next token by a pass over everything before it."""

    @torch.inference_mode()
    def next_token(ids: list[int]) -> Tensor:
        logits_V = model(torch.tensor([ids]))[0, -1].clone()
        for token in set(ids):
            positive, penalty = bool(logits_V[token] > 0), params.repetition_penalty
            logits_V[token] *= 1 / penalty if positive else penalty
        return sampling_probs(logits_V, params)

    return next_token


def plain_decode(
    p: NextProbs,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    random: Random,
    eos_token_ids: Collection[int] = (),
) -> list[int]:
    """Return new tokens, one pass each."""
    output: list[int] = []
    while len(output) < max_new_tokens:
        output.append(random.target(p(prompt_ids + output)))
        if output[-1] in eos_token_ids:
            break
    return output


def speculative_decode(
    p: NextProbs,
    q: NextProbs,
    prompt_ids: list[int],
    *,
    gamma: int,
    max_new_tokens: int,
    random: Random,
    eos_token_ids: Collection[int] = (),
) -> list[int]:
    """Return new tokens by token verification; the first one is the target's own, as after a prefill."""
    output = [random.target(p(prompt_ids))]
    while len(output) < max_new_tokens and output[-1] not in eos_token_ids:
        num_tokens = min(gamma, max_new_tokens - len(output) - 1)
        for token in _round(p, q, prompt_ids + output, num_tokens, random):
            output.append(token)
            if token in eos_token_ids:
                break
    return output


def _round(p: NextProbs, q: NextProbs, ids: list[int], gamma: int, random: Random) -> list[int]:
    drafted: list[int] = []
    for _ in range(gamma):
        drafted.append(random.draft(q(ids + drafted)))
    for t, token in enumerate(drafted):
        p_V, q_V = p(ids + drafted[:t]), q(ids + drafted[:t])
        if not random.accept(min(1.0, float(p_V[token] / q_V[token]))):
            rest_V = (p_V - q_V).clamp(min=0)
            return [*drafted[:t], random.target(rest_V / rest_V.sum() if rest_V.sum() > 0 else p_V)]
    return [*drafted, random.target(p(ids + drafted))]
