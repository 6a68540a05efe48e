"""Law tests over a few tokens, and what a test tells: see models/verify/plan.py."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import COUPLED
from models.decode.sampling.verifiers import Verifier
from models.verify.drafts import AUTO, Gamma
from models.verify.exact import Output, chi_square, total_variation
from models.verify.tiny_vocab import Few

EXACT = 1e-12
"""Total variation that rounding in float64 explains: about 1e-15 for each token."""
DTYPE_SHARE, DTYPE_FLOOR = 4.0, 1e-5
"""A draft may move a dtype's law by so many times what the dtype itself moves it, or by the floor."""
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
COUNTED_GAMMA = 2


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


def check_dtype(few: Few, precise: Few, case: Case, *, dtype: str, beside: bool = False) -> Check:
    """The law in the dtype that decodes, in which passes on one token and on several round differently.

    The yardstick is how far plain decoding is from that of `precise`, the same model in float64.
    """
    assert case.gamma != AUTO, case
    options: dict[str, Any] = {"length": case.gamma + 2, "params": LAWS[case.law], "eos_token_ids": ()}
    plain = few.law(draft=None, **options)
    of_dtype = total_variation(plain, precise.reference(**options))
    drafted = {"draft": case.draft, "gamma": case.gamma, "verifier": case.verifier}
    ours = few.law(**drafted, beside=beside, **options)
    distance, bound = total_variation(ours, plain), max(DTYPE_FLOOR, DTYPE_SHARE * of_dtype)
    return _check(
        "dtype",
        case,
        dtype=dtype,
        batch=1 + len(few.COMPANIONS) if beside else 1,
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
