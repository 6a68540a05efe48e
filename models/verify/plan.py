"""The distribution tests on a user's own model: what it writes with a draft is what it writes without one.

    exact     the engine's distribution over a few tokens (models/verify/tiny_vocab.py), in float64, by
              walking through every branch of its choices; against full passes over all that is before
    dtype     the same walk in the dtype that decodes, against plain decoding in that dtype
    counts    texts drawn with the shipped random numbers, against the distribution that a walk gave
    coupled   the whole model: a seed's tokens with a draft and without one
    greedy    the whole model: the same for the likeliest tokens

Drafts take part one by one (members, other models, copied text, an adversarial one); by the choice of the
controller of `--gamma auto`, whose clock is arithmetic here; and in batches, where each text has another.

Walks draw nothing and cannot fail by chance. Counts can: all of them together do so with a probability
below FALSE_ALARM. Identities allow a first difference between two tokens that are as good as tied: passes
on one token and on several add in different orders.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from models.decode.engine.drafters import DRAFTERS
from models.decode.sampling.samplers import COUPLED
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.packed.quantize import pack
from models.verify.checks import (
    COUNTED_GAMMA,
    GREEDY,
    SAMPLINGS,
    UNCHANGED,
    Case,
    Check,
    check_counts,
    check_dtype,
    check_exact,
)
from models.verify.drafts import (
    ADVERSARIAL,
    ANY,
    AUTO,
    Drafts,
    ForModel,
    Gamma,
    Subject,
    adversarial,
    registered,
)
from models.verify.effort import DEFAULT_MINUTES, FULL, QUICK, Costs, Effort, time_pass
from models.verify.identity import GAMMAS, Whole, check_batch, check_identity
from models.verify.restrict import likeliest_tokens, restrict
from models.verify.tiny_vocab import TinyVocab

FALSE_ALARM = 1e-6
"""Chance of a false alarm in all counts of a command. They share a tenth of it: Pearson's statistic only
nears its distribution, and with cells of 8 expected counts exceeds 1e-5 up to 1.8 times as often."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every test of a model, to be run in turn, and what that takes."""

    jobs: list[Callable[[], Check]]
    effort: Effort
    seconds: float


def plan_checks(
    model: ElasticLM,
    *,
    dtype: str,
    drafts: Mapping[str, ForModel],
    verifiers: Sequence[str],
    prompts: Sequence[Sequence[int]],
    effort: Effort | None = None,
    num_trials: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Plan:
    """Return every test of a model, and the time that they take by passes that are timed here.

    Args:
        model: in the dtype that decodes, packed or not.
        dtype: its name, one of `PRECISIONS`.
        drafts: drafts by name, at least one; an adversarial one and copied text come on top.
        verifiers: names in `VERIFIER_NAMES`. Greedy decoding, which has no use for them, is always tested.
        prompts: token ids, at least one. The few tokens are the likeliest after them; identities go on
            from them.
        effort: the sizes; None takes the small ones where the full ones take more than `DEFAULT_MINUTES`.
        num_trials: texts drawn for each test of counts; None is the effort's.
        length: tokens of each continuation; None is the effort's, as far as the context reaches.
        seed: random seed.
    """
    first = next(iter(drafts))
    drafts = {**drafts, ADVERSARIAL: adversarial, **{name: registered(name) for name in DRAFTERS}}
    vocab_size, walked = model.config.vocab_size, [one for one in verifiers if one != COUPLED]
    tokens = likeliest_tokens(model, prompts, min(vocab_size, max(FULL.num_tokens.values())))
    plain, precise = restrict(model, tokens), restrict(model, tokens, torch.float64)
    wholes = {"fp32": pack(restrict(model, range(vocab_size), torch.float32), "fp32"), dtype: model}
    samplings = (GREEDY, UNCHANGED) if COUPLED in verifiers else (GREEDY,)
    room = model.config.max_position_embeddings - max(map(len, prompts))
    costs = Costs(
        precise=time_pass(precise),
        own=time_pass(pack(plain, dtype)),
        wholes=sum(time_pass(one) for one in wholes.values()),
    )

    def sized(one: Effort) -> tuple[Effort, float]:
        words = min(one.length if length is None else length, room)
        draws = one.num_trials if num_trials is None else num_trials
        one = replace(one, num_trials=draws, length=words)
        numbers = {"num_prompts": len(prompts), "num_samplings": len(samplings)}
        return one, costs.seconds(one, num_drafts=len(drafts) - len(DRAFTERS), **numbers)

    chosen, seconds = sized(effort or FULL)
    if effort is None and seconds > 60 * DEFAULT_MINUTES:
        chosen, seconds = sized(QUICK)
    jobs: list[Callable[[], Check]] = []
    if walked or COUPLED in verifiers:
        jobs += _walks(plain, precise, drafts, first, tokens, verifiers, dtype, chosen, seed)
    for name, one in wholes.items():
        whole = Whole(model=one, dtype=name, prompts=prompts, length=chosen.length, seed=seed)
        made = Drafts(Subject(one, View, range(vocab_size)), drafts)
        for sampling in samplings:
            jobs += _identities(whole, made, list(drafts), sampling)
    return Plan(jobs=jobs, effort=chosen, seconds=seconds)


def _walks(
    plain: ElasticLM,
    precise: ElasticLM,
    drafts: Mapping[str, ForModel],
    first: str,
    tokens: Sequence[int],
    verifiers: Sequence[str],
    dtype: str,
    effort: Effort,
    seed: int,
) -> list[Callable[[], Check]]:
    """List the tests over a few tokens.

    Args:
        plain: the model over these tokens, in the dtype of its weights.
        precise: the same in float64.
        drafts: all drafts by name.
        first: the draft of tests that have one.
        tokens: of the whole model, likeliest first.
        verifiers: names in `VERIFIER_NAMES`.
        dtype: that decodes.
        effort: the sizes.
        seed: random seed.
    """
    walked = [one for one in verifiers if one != COUPLED]
    few = {
        gamma: TinyVocab(_fewer(precise, number), drafts, tokens=tokens)
        for gamma, number in effort.num_tokens.items()
    }
    counted_tokens = effort.num_tokens[COUNTED_GAMMA]
    own = TinyVocab(pack(_fewer(plain, counted_tokens), dtype), drafts, tokens=tokens)
    jobs = [job for verifier in walked for job in _exact(few, verifier, list(drafts), first)]
    if walked:
        pair = {name: drafts[name] for name in (first, ADVERSARIAL)}
        small, exact = (_fewer(one, effort.num_tokens[3]) for one in (plain, precise))
        jobs += _in_batch(small, exact, pair, tokens, walked, dtype)
    names = (first, ADVERSARIAL, *DRAFTERS)
    counted = [Case(verifier, name, COUNTED_GAMMA) for verifier in walked for name in names]
    jobs += [partial(check_dtype, own, few[COUNTED_GAMMA], case, dtype=dtype) for case in counted]
    if COUPLED in verifiers:
        draft, gamma = (ADVERSARIAL, COUNTED_GAMMA) if dtype == "fp32" else (None, 0)
        counted.append(Case(COUPLED, draft, gamma))
    count = partial(check_counts, own, dtype=dtype, num_trials=effort.num_trials, seed=seed)
    return [*jobs, *(partial(count, case, bound=FALSE_ALARM / 10 / len(counted)) for case in counted)]


def _fewer(model: ElasticLM, number: int) -> ElasticLM:
    """Return a restricted model over its first tokens alone; the other weights are the same memory."""
    return restrict(model, range(min(number, model.config.vocab_size)), shared=True)


def _in_batch(
    plain: ElasticLM,
    precise: ElasticLM,
    drafts: Mapping[str, ForModel],
    tokens: Sequence[int],
    verifiers: Iterable[str],
    dtype: str,
) -> list[Callable[[], Check]]:
    """List walks of a text that is one of a batch, in float64 and in the dtype."""
    few = TinyVocab(precise, drafts, tokens=tokens, remember=False)
    own = TinyVocab(pack(plain, dtype), drafts, tokens=tokens, remember=False)
    jobs: list[Callable[[], Check]] = []
    for verifier in verifiers:
        case = Case(verifier, next(iter(drafts)), 1)
        jobs.append(partial(check_exact, few, case, in_batch=True))
        jobs.append(partial(check_dtype, own, few, case, dtype=dtype, in_batch=True))
    return jobs


def _identities(
    whole: Whole, made: Drafts, drafts: Sequence[str], sampling: str
) -> list[Callable[[], Check]]:
    """List identities of every draft, of the controller's choice among them, and of a batch."""
    jobs: list[Callable[[], Check]] = [
        partial(check_identity, whole, draft, partial(made.policy, draft), sampling=sampling)
        for draft in drafts
    ]
    jobs.append(
        partial(check_identity, whole, ANY, partial(made.policy, ANY), sampling=sampling, gammas=[AUTO])
    )
    rows: list[tuple[str, Gamma]] = [
        *zip((drafts[0], ADVERSARIAL, *DRAFTERS), GAMMAS, strict=False),
        (ANY, AUTO),
    ]
    policies = {row: partial(made.policy, row[0]) for row in rows}
    return [*jobs, partial(check_batch, whole, policies, sampling=sampling)]


def _exact(
    few: Mapping[int, TinyVocab], verifier: str, drafts: Iterable[str], first: str
) -> list[Callable[[], Check]]:
    """List walks: each draft for one token, each sampling for two, long blocks, a controller, an end."""
    jobs: list[Callable[[], Check]] = []
    jobs += [partial(check_exact, few[1], Case(verifier, draft, 1)) for draft in drafts]
    sampled = [name for name, params in SAMPLINGS.items() if not params.is_greedy]
    jobs += [partial(check_exact, few[2], Case(verifier, first, 2, name)) for name in sampled]
    jobs += [partial(check_exact, few[3], Case(verifier, draft, 3)) for draft in (first, ADVERSARIAL)]
    jobs.append(partial(check_exact, few[3], Case(verifier, ANY, AUTO)))
    return [*jobs, partial(check_exact, few[2], Case(verifier, ADVERSARIAL, 2), ends=True)]
