"""Distribution tests over a few tokens, and the outcome of a test: see models/verify/plan.py."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import COUPLED
from models.decode.sampling.verifiers import Verifier
from models.verify.drafts import AUTO, Gamma
from models.verify.effort import visible_distance
from models.verify.exact import Output, chi_square, total_variation
from models.verify.tiny_vocab import TinyVocab

EXACT = 1e-12
"""Total variation that rounding in float64 explains: about 1e-15 for each token."""
DTYPE_FACTOR, DTYPE_FLOOR = 4.0, 1e-5
"""A draft may move a distribution by this multiple of what the dtype itself moves it, or by the floor."""
UNCHANGED, GREEDY = "T=1", "greedy"
SAMPLINGS: Mapping[str, SamplingParams] = {
    UNCHANGED: SamplingParams(temperature=1.0),
    "T=0.7": SamplingParams(temperature=0.7),
    "T=1.5 top-k=2": SamplingParams(temperature=1.5, top_k=2),
    "T=1.5 top-p=0.8": SamplingParams(temperature=1.5, top_p=0.8),
    "T=1.5 min-p=0.3": SamplingParams(temperature=1.5, min_p=0.3),
    "T=1 penalty=1.3": SamplingParams(temperature=1.0, repetition_penalty=1.3),
    "all": SamplingParams(temperature=1.5, top_k=3, top_p=0.95, min_p=0.05, repetition_penalty=0.8),
    GREEDY: SamplingParams(),
    "greedy penalty=3": SamplingParams(repetition_penalty=3.0),
}
PRECISE = "fp64"
COUNTED_GAMMA = 2


@dataclass(frozen=True)
class Case:
    """A case of decoding: who drafts how much, verified how, from which sampling."""

    verifier: str | Verifier
    draft: str | None
    gamma: Gamma
    sampling: str = UNCHANGED


@dataclass(frozen=True, kw_only=True)
class Check:
    """One test and its outcome."""

    test: str
    """`exact`, `dtype`, `counts`, `coupled` or `greedy`."""
    verifier: str
    draft: str
    """`any`: the controller's choice among all; with commas where the texts of a batch have one each."""
    gamma: str
    """The drafted tokens a round; with commas where prompts take turns."""
    sampling: str
    """A name in `SAMPLINGS`."""
    dtype: str
    batch: int
    """Texts that were decoded in one batch; 1: alone."""
    value: float
    """Total variation; of counts the p-value; of an identity the widest gap of a first difference."""
    bound: float
    """The most that the value may be; of counts the least."""
    note: str
    passed: bool


def check_exact(few: TinyVocab, case: Case, *, ends: bool = False, in_batch: bool = False) -> Check:
    """Compare the joint distribution of a few tokens: the prefill's, a round's, and what its cache leads to.

    Args:
        few: in float64.
        case: not `coupled`, whose noise cannot be walked through.
        ends: whether the last of the few tokens ends the text, wherever in a block it falls.
        in_batch: whether the text is one of a batch.
    """
    eos = {few.num_tokens - 1} if ends else set()
    length = (COUNTED_GAMMA if case.gamma == AUTO else case.gamma) + 2
    options: dict[str, Any] = {"length": length, "params": SAMPLINGS[case.sampling], "eos_token_ids": eos}
    theirs = few.reference(**options)
    ours = few.distribution(
        draft=case.draft, gamma=case.gamma, verifier=case.verifier, in_batch=in_batch, **options
    )
    distance = total_variation(ours, theirs)
    note = f"{len(theirs)} texts of {few.num_tokens} tokens" + ", one of which ends them" * ends
    return _check("exact", case, in_batch, dtype=PRECISE, value=distance, bound=EXACT, note=note)


def check_dtype(
    few: TinyVocab, precise: TinyVocab, case: Case, *, dtype: str, in_batch: bool = False
) -> Check:
    """Compare distributions in the dtype that decodes, where a pass rounds by its number of tokens.

    The yardstick is how far plain decoding is from that of `precise`, the same model in float64.
    """
    assert case.gamma != AUTO, case
    options: dict[str, Any] = {
        "length": case.gamma + 2,
        "params": SAMPLINGS[case.sampling],
        "eos_token_ids": (),
    }
    plain = few.distribution(draft=None, **options)
    of_dtype = total_variation(plain, precise.reference(**options))
    drafted = {"draft": case.draft, "gamma": case.gamma, "verifier": case.verifier}
    ours = few.distribution(**drafted, in_batch=in_batch, **options)
    distance, bound = total_variation(ours, plain), max(DTYPE_FLOOR, DTYPE_FACTOR * of_dtype)
    note = f"from fp64 to {dtype} the distribution moves by {of_dtype:.1e}"
    return _check("dtype", case, in_batch, dtype=dtype, value=distance, bound=bound, note=note)


def check_counts(
    few: TinyVocab, case: Case, *, dtype: str, num_trials: int, bound: float, seed: int = 0
) -> Check:
    """Draw texts by the shipped random numbers, and judge their counts under the target's distribution.

    That distribution is plain decoding's, walked through in fp32. In other dtypes, where a draft may move it
    by rounding (`check_dtype`), counts are compared with what the walk gives for this draft.
    """
    options: dict[str, Any] = {
        "params": SAMPLINGS[case.sampling],
        "length": COUNTED_GAMMA + 2,
        "eos_token_ids": (),
    }
    drafted = {**options, "draft": case.draft, "gamma": case.gamma, "verifier": case.verifier}
    # The noise of `coupled` cannot be walked through; without a draft it has no rounding of its own.
    plainly = dtype == "fp32" or case.verifier == COUPLED
    theirs = few.distribution(**options, draft=None) if plainly else few.distribution(**drafted)
    counts: Counter[Output] = Counter(
        tuple(few.decode(SeededRandom(seed * num_trials + trial), **drafted)) for trial in range(num_trials)
    )
    p_value = chi_square(counts, theirs)
    seen = visible_distance(num_trials, len(theirs), bound)
    note = f"{num_trials:,} draws of {len(theirs)} texts; sees a total variation of {seen:.2f}"
    return _check("counts", case, dtype=dtype, value=p_value, bound=bound, note=note)


def _check(
    test: str, case: Case, in_batch: bool = False, *, dtype: str, value: float, bound: float, note: str
) -> Check:
    return Check(
        test=test,
        verifier=case.verifier if isinstance(case.verifier, str) else "of the caller",
        draft=case.draft or "none",
        gamma=str(case.gamma),
        sampling=case.sampling,
        dtype=dtype,
        batch=1 + len(TinyVocab.COMPANIONS) if in_batch else 1,
        value=value,
        bound=bound,
        note=note,
        passed=value >= bound if test == "counts" else value <= bound,
    )
