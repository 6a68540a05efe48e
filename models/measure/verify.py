"""The law tests on a user's own model: what it writes with a draft is what it writes without one.

    exact     the engine's law over a few tokens (models/measure/few.py), in float64, by walking through
              every branch of its choices; against full passes over everything before each token
    dtype     the same walk in the dtype that decodes, against plain decoding in that dtype
    counts    texts drawn with the shipped random numbers, against the law that a walk gave
    coupled   the whole model: a seed's tokens with a draft and without one
    greedy    the whole model: the same for the likeliest tokens

Drafts take part one by one (members, other models, copied text, a hostile one); by the choice of the
controller of `--gamma auto`, whose clock is arithmetic here; and in batches, where each text has another.

Walks draw nothing and cannot fail by chance. Counts can: all of them together do so with a probability
below FALSE_ALARM. Identities allow a first difference between two tokens that are as good as tied: passes
on one token and on several add in different orders.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from models.decode.accept import Verifier
from models.decode.chance import SeededRandom, gumbel_noise
from models.decode.choose import COUPLED
from models.decode.engine import stream, stream_batch
from models.decode.policy import Policy
from models.decode.sampling import SamplingParams, law, penalise
from models.elastic import ElasticLM
from models.measure.drafts import (
    ANY,
    AUTO,
    HOSTILE,
    LOOKUP,
    Drafts,
    ForModel,
    Gamma,
    Subject,
    copied,
    hostile,
)
from models.measure.few import Few
from models.measure.laws import Output, chi_square, total_variation
from models.measure.restrict import likeliest_tokens, restrict
from models.probe import DTYPES
from models.quantize import INT8, pack
from models.view import View

EXACT = 1e-12
"""Total variation that rounding in float64 explains: about 1e-15 for each token."""
DTYPE_SHARE, DTYPE_FLOOR = 4.0, 1e-5
"""A draft may move a dtype's law by so many times what the dtype itself moves it, or by the floor."""
FALSE_ALARM = 1e-6
"""Of all counts of a command. They share a tenth of it: Pearson's statistic only nears its law, and at 1e-5
is already exceeded up to 1.8 times as often as it should be, with cells of 8 expected counts."""
NEAR_TIE = 8.0
"""Two logits are tied if they differ by so many roundings of the largest one: each is a long sum. Seen were
up to 6.5, in fp32, of weights whose partial sums exceed the logits."""

PLAIN, GREEDY = "T=1", "greedy"
LAWS: Mapping[str, SamplingParams] = {
    PLAIN: SamplingParams(temperature=1.0),
    "T=0.7": SamplingParams(temperature=0.7),
    "T=1.5 top-k=2": SamplingParams(temperature=1.5, top_k=2),
    "T=1.5 top-p=0.8": SamplingParams(temperature=1.5, top_p=0.8),
    "T=1.5 min-p=0.3": SamplingParams(temperature=1.5, min_p=0.3),
    "T=1 penalty=1.3": SamplingParams(temperature=1.0, repetition_penalty=1.3),
    "all": SamplingParams(temperature=1.5, top_k=3, top_p=0.95, min_p=0.05, repetition_penalty=0.8),
    GREEDY: SamplingParams(),
}
PRECISE = "fp64"
NUM_TOKENS = {1: 5, 2: 4, 3: 2}
"""By gamma: the branches of a walk grow faster than tokens ** (gamma + 2)."""
COUNTED_GAMMA = 2
GAMMAS = (1, 2, 4, 7)
"""Of identities, in turn."""


@dataclass(frozen=True)
class Case:
    """What is decoded and how."""

    verifier: str | Verifier
    draft: str | None
    gamma: Gamma
    law: str = PLAIN


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test and its outcome."""

    test: str
    """`exact`, `dtype`, `counts`, `coupled` or `greedy`."""
    verifier: str
    draft: str
    """`any`: the controller's choice among all; with commas where the texts of a batch have one each."""
    gamma: str
    """Likewise; with commas where prompts take turns."""
    law: str
    """How tokens are chosen."""
    dtype: str
    batch: int
    """Texts that were decoded together; 1: alone."""
    value: float
    """Total variation; of counts the p-value; of an identity the widest gap of a first difference."""
    bound: float
    """The most that the value may be; of counts the least."""
    note: str
    passed: bool


# ------------------------------------------------------------------ laws over a few tokens


def check_exact(few: Few, case: Case, *, ends: bool = False, beside: bool = False) -> Check:
    """The joint law of a few tokens: the prefill's, a whole round's, and what its cache leads to.

    Args:
        few: in float64.
        case: not `coupled`, whose noise cannot be walked through.
        ends: whether the last of the few tokens ends the text, wherever in a block it falls.
        beside: whether the text is one of a batch.
    """
    eos = {few.num_tokens - 1} if ends else set()
    length = (COUNTED_GAMMA if case.gamma == AUTO else case.gamma) + 2
    options: dict[str, Any] = {"length": length, "params": LAWS[case.law], "eos_token_ids": eos}
    theirs = few.reference(**options)
    ours = few.law(draft=case.draft, gamma=case.gamma, verifier=case.verifier, beside=beside, **options)
    distance = total_variation(ours, theirs)
    return _check(
        "exact",
        case,
        dtype=PRECISE,
        batch=1 + len(few.COMPANIONS) if beside else 1,
        value=distance,
        bound=EXACT,
        passed=distance <= EXACT,
        note=f"{len(theirs)} texts of {few.num_tokens} tokens" + ", one of which ends them" * ends,
    )


def check_dtype(few: Few, precise: Few, case: Case, *, dtype: str) -> Check:
    """The law in the dtype that decodes, in which passes on one token and on several round differently.

    The yardstick is how far plain decoding is from that of `precise`, the same model in float64.
    """
    options: dict[str, Any] = {"length": COUNTED_GAMMA + 2, "params": LAWS[case.law], "eos_token_ids": ()}
    plain = few.law(draft=None, **options)
    of_dtype = total_variation(plain, precise.reference(**options))
    ours = few.law(draft=case.draft, gamma=case.gamma, verifier=case.verifier, **options)
    distance, bound = total_variation(ours, plain), max(DTYPE_FLOOR, DTYPE_SHARE * of_dtype)
    return _check(
        "dtype",
        case,
        dtype=dtype,
        value=distance,
        bound=bound,
        passed=distance <= bound,
        note=f"from fp64 to {dtype} the law moves by {of_dtype:.1e}",
    )


def check_counts(few: Few, case: Case, *, dtype: str, num_trials: int, bound: float, seed: int = 0) -> Check:
    """Texts drawn by the shipped random numbers, and the chance of such counts under the target's law.

    That law is plain decoding's, walked through in fp32. In other dtypes, where a draft may move it by
    rounding (`check_dtype`), counts are compared with what the walk gives for this draft.
    """
    options: dict[str, Any] = {"params": LAWS[case.law], "length": COUNTED_GAMMA + 2, "eos_token_ids": ()}
    drafted = {**options, "draft": case.draft, "gamma": case.gamma, "verifier": case.verifier}
    # The noise of `coupled` cannot be walked through; without a draft it has no rounding of its own.
    plainly = dtype == "fp32" or case.verifier == COUPLED
    theirs = few.law(**options, draft=None) if plainly else few.law(**drafted)
    counts: Counter[Output] = Counter(
        tuple(few.decode(SeededRandom(seed * num_trials + trial), **drafted)) for trial in range(num_trials)
    )
    p_value = chi_square(counts, theirs)
    return _check(
        "counts",
        case,
        dtype=dtype,
        value=p_value,
        bound=bound,
        passed=p_value >= bound,
        note=f"{num_trials:,} draws of {len(theirs)} texts",
    )


# ------------------------------------------------------------------ tokens of the whole model


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The whole model in a dtype, and prompts to continue; plain texts are made once."""

    model: ElasticLM
    dtype: str
    prompts: Sequence[Sequence[int]]
    length: int
    seed: int = 0
    _plain: dict[Any, list[int]] = field(default_factory=dict)

    def decode(
        self, prompt: Sequence[int], params: SamplingParams, policy: Policy | None = None
    ) -> list[int]:
        """The tokens by `coupled`, for which greedy parameters have no use."""
        tokens = stream(
            self.model, prompt, policy=policy, random=SeededRandom(self.seed), **self._options(params)
        )
        return [token.id for token in tokens]

    def decode_together(self, params: SamplingParams, policies: Iterable[Policy]) -> list[list[int]]:
        """The tokens of every prompt, in one batch with a policy for each."""
        streams = stream_batch(
            self.model,
            self.prompts,
            new_policy=iter(policies).__next__,
            randoms=[SeededRandom(self.seed) for _ in self.prompts],
            **self._options(params),
        )
        return [[token.id for token in tokens] for tokens in streams]

    def plain(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """The same without a draft, alone."""
        key = (tuple(prompt), params)
        if key not in self._plain:
            self._plain[key] = self.decode(prompt, params)
        return self._plain[key]

    def _options(self, params: SamplingParams) -> "_Options":
        return {
            "params": params,
            "max_new_tokens": self.length,
            "eos_token_ids": (),
            "verifier": COUPLED,
        }


class _Options(TypedDict):
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: Collection[int]
    verifier: str


MakePolicy: TypeAlias = Callable[[Gamma], Policy]
"""Of a text, by its number of drafted tokens."""


def check_identity(
    whole: Whole, name: str, make_policy: MakePolicy, *, law: str, gammas: Sequence[Gamma] = GAMMAS
) -> Check:
    """Tokens with a draft and without one: the same, or tied where they first differ.

    Args:
        whole: the model and its prompts.
        name: of the draft.
        make_policy: gives it to a text.
        law: a name in `LAWS`.
        gammas: drafted tokens a round, in turn over the prompts.
    """
    params, turns = LAWS[law], cycle(gammas)
    ours = [
        whole.decode(prompt, params, make_policy(gamma))
        for prompt, gamma in zip(whole.prompts, turns, strict=False)
    ]
    shown = ",".join(map(str, gammas[: len(whole.prompts)]))
    return _compare(whole, ours, law, draft=name, gamma=shown, batch=1)


def check_batch(whole: Whole, policies: Mapping[tuple[str, Gamma], MakePolicy], *, law: str) -> Check:
    """Tokens of all prompts decoded together, a draft each in turn, and of each alone without one.

    Args:
        whole: the model and its prompts.
        policies: by name and gamma.
        law: a name in `LAWS`.
    """
    rows = [row for _, row in zip(whole.prompts, cycle(policies.items()), strict=False)]
    ours = whole.decode_together(LAWS[law], (make(gamma) for (_, gamma), make in rows))
    names, gammas = zip(*dict.fromkeys(key for key, _ in rows), strict=True)
    shown = ",".join(map(str, gammas))
    return _compare(whole, ours, law, draft=",".join(names), gamma=shown, batch=len(rows))


def _compare(whole: Whole, ours: Sequence[list[int]], law: str, **case: Any) -> Check:
    """Texts of all prompts and plain ones."""
    params = LAWS[law]
    num_same, num_total, gaps = 0, 0, []
    for prompt, text in zip(whole.prompts, ours, strict=True):
        plain = whole.plain(prompt, params)
        same = next((t for t, (a, b) in enumerate(zip(text, plain, strict=True)) if a != b), len(plain))
        num_same, num_total = num_same + same, num_total + len(plain)
        if same < len(plain):
            gaps.append(gap_between(whole, [*prompt, *plain[:same]], (text[same], plain[same]), params))
    # The text that is furthest from a tie is shown.
    gap, bound = max(gaps, key=lambda found: found[0] - found[1], default=(0.0, 0.0))
    note = f"{num_same} tokens of {num_total} alike"
    if gaps:
        note += f"; texts that differ: {len(gaps)}"
    return Check(
        test=GREEDY if params.is_greedy else COUPLED,
        verifier="" if params.is_greedy else COUPLED,
        law=law,
        dtype=whole.dtype,
        value=gap,
        bound=bound,
        note=note,
        passed=gap <= bound,
        **case,
    )


@torch.inference_mode()
def gap_between(
    whole: Whole, ids: Sequence[int], tokens: tuple[int, int], params: SamplingParams
) -> tuple[float, float]:
    """By how much what is compared after `ids` tells two tokens apart, and how much is still a tie."""
    device = whole.model.model.embed_tokens.weight.device
    logits_V: Tensor = whole.model(torch.tensor([list(ids)], device=device), num_last=1)[0, -1]
    tie = NEAR_TIE * _rounding(whole.dtype) * float(logits_V.abs().max())
    keys_V = penalise(logits_V.double().cpu().unsqueeze(0), params, ids)[0]
    if not params.is_greedy:
        tie /= params.temperature
        keys_V = law(keys_V, params).log() + gumbel_noise(whole.seed, len(ids), len(keys_V))
    return float((keys_V[tokens[0]] - keys_V[tokens[1]]).abs()), tie


def _rounding(dtype: str) -> float:
    """Of one number, relative to it; an int8 model rounds its activations to 8 bits."""
    return 2.0**-7 if dtype == INT8 else torch.finfo(DTYPES[dtype]).eps


def _check(test: str, case: Case, *, batch: int = 1, **outcome: Any) -> Check:
    return Check(
        test=test,
        verifier=case.verifier if isinstance(case.verifier, str) else "of the caller",
        draft=case.draft or "none",
        gamma=str(case.gamma),
        law=case.law,
        batch=batch,
        **outcome,
    )


# ------------------------------------------------------------------ all of them


def plan_checks(
    model: ElasticLM,
    *,
    dtype: str,
    drafts: Mapping[str, ForModel],
    verifiers: Sequence[str],
    prompts: Sequence[Sequence[int]],
    num_trials: int,
    length: int,
    seed: int = 0,
) -> list[Callable[[], Check]]:
    """Every test of a model, to be run in turn.

    Args:
        model: in the dtype that decodes, packed or not.
        dtype: its name, one of `PRECISIONS`.
        drafts: by name, at least one; a hostile one and copied text come on top.
        verifiers: names in `VERIFIER_NAMES`. Greedy decoding, which has no use for them, is always tested.
        prompts: token ids, at least one. The few tokens are the likeliest after them; identities go on
            from them.
        num_trials: texts drawn for each test of counts.
        length: tokens of each continuation.
        seed: of what is drawn.
    """
    first, drafts = next(iter(drafts)), {**drafts, HOSTILE: hostile, LOOKUP: copied}
    vocab_size, walked = model.config.vocab_size, [one for one in verifiers if one != COUPLED]
    tokens = likeliest_tokens(model, prompts, min(vocab_size, max(NUM_TOKENS.values())))
    restricted = {gamma: restrict(model, tokens[:number]) for gamma, number in NUM_TOKENS.items()}
    precise = {gamma: Few(one.double(), drafts, tokens=tokens) for gamma, one in restricted.items()}
    own = Few(pack(restrict(model, tokens[: NUM_TOKENS[COUNTED_GAMMA]]), dtype), drafts, tokens=tokens)
    jobs = [job for verifier in walked for job in _exact(precise, verifier, list(drafts), first)]
    if walked:
        alone = {name: drafts[name] for name in (first, HOSTILE)}
        small = Few(restricted[3].double(), alone, tokens=tokens, remember=False)
        jobs += [partial(check_exact, small, Case(one, first, 1), beside=True) for one in walked]
    counted = [Case(one, name, COUNTED_GAMMA) for one in walked for name in (first, HOSTILE)]
    jobs += [partial(check_dtype, own, precise[COUNTED_GAMMA], case, dtype=dtype) for case in counted]
    if COUPLED in verifiers:
        counted.append(Case(COUPLED, HOSTILE, COUNTED_GAMMA) if dtype == "fp32" else Case(COUPLED, None, 0))
    count = partial(check_counts, own, dtype=dtype, num_trials=num_trials, seed=seed)
    jobs += [partial(count, case, bound=FALSE_ALARM / 10 / len(counted)) for case in counted]
    wholes = {"fp32": pack(restrict(model, range(vocab_size), torch.float32), "fp32"), dtype: model}
    for name, one in wholes.items():
        whole = Whole(model=one, dtype=name, prompts=prompts, length=length, seed=seed)
        made = Drafts(Subject(one, View, range(vocab_size)), drafts)
        for law_name in (GREEDY, PLAIN) if COUPLED in verifiers else (GREEDY,):
            jobs += _identities(whole, made, list(drafts), law_name)
    return jobs


def _identities(
    whole: Whole, made: Drafts, drafts: Sequence[str], law_name: str
) -> list[Callable[[], Check]]:
    """Every draft, the controller's choice among them, and a batch."""
    jobs: list[Callable[[], Check]] = [
        partial(check_identity, whole, draft, partial(made.policy, draft), law=law_name) for draft in drafts
    ]
    jobs.append(partial(check_identity, whole, ANY, partial(made.policy, ANY), law=law_name, gammas=[AUTO]))
    rows: list[tuple[str, Gamma]] = [*zip((drafts[0], HOSTILE, LOOKUP), GAMMAS, strict=False), (ANY, AUTO)]
    policies = {row: partial(made.policy, row[0]) for row in rows}
    return [*jobs, partial(check_batch, whole, policies, law=law_name)]


def _exact(
    few: Mapping[int, Few], verifier: str, drafts: Iterable[str], first: str
) -> list[Callable[[], Check]]:
    """Every draft for one token, every law for two, the longest block, a controller, an end of text."""
    jobs: list[Callable[[], Check]] = []
    jobs += [partial(check_exact, few[1], Case(verifier, draft, 1)) for draft in drafts]
    sampled = [name for name, params in LAWS.items() if not params.is_greedy]
    jobs += [partial(check_exact, few[2], Case(verifier, first, 2, name)) for name in sampled]
    jobs += [partial(check_exact, few[3], Case(verifier, draft, 3)) for draft in (first, HOSTILE)]
    jobs.append(partial(check_exact, few[3], Case(verifier, ANY, AUTO)))
    return [*jobs, partial(check_exact, few[2], Case(verifier, HOSTILE, 2), ends=True)]
