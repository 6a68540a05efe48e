"""The draft is a choice made after training, for one machine: which member, how stored, how many tokens.

    arithmetic   candidates by their operations, the cheapest first (models/elastic/count.py)
    costs        of every candidate (train/search/measure.py)
    acceptance   on a little text, and only while a perfect draft of that cost could still win
    variants     the few best in other precisions, and the best of these with a part of the vocabulary
    decoding     the few best of all and plain (train/search/confirm.py)

Greedy decoding and each temperature are searched for by themselves: another draft may be best. Nothing
here touches what is written, only how fast.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.base.errors import UsageError
from models.base.stopwatch import Clock
from models.decode.engine.costs import DraftCosts
from models.decode.engine.trimmed_head import most_frequent
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED
from models.decode.tune.predict import LEAST_SPEEDUP, round_speedup
from models.decode.tune.tuned import PLAIN, Found
from models.elastic.count import count_flops
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.packed.quantize import INT4, INT8
from train.search.candidates import NUM_CACHED, Candidate, list_candidates
from train.search.confirm import Confirmed, confirm
from train.search.measure import Estimate, Measurements, Progress, Text, best_of, verifiers_of

PRECISIONS = ("fp32", "bf16", INT8, INT4)
FIRST_TOKENS = 600
"""Of the text that every candidate is tried on."""
NUM_FINALISTS = 4
NUM_CUT = 2
"""Drafts whose vocabulary is tried cut."""
CHEAPER = 0.97
"""A variant that costs more than this share of the original is no gain."""
COVERAGES = (0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that was found."""

    estimates: list[Estimate]
    """The best gamma of each measured (draft, law, verifier), the fastest first."""
    confirmed: list[Confirmed]
    """For each law plain decoding, then the best drafts, the fastest predicted first."""
    slowdown: dict[int, float]
    """v(m) of the target's pass alone."""
    num_candidates: int
    num_tried: int
    """Of these, the ones whose acceptance was measured."""
    busy_rounds: int
    """Of confirmation, in which other programs kept the machine busy."""


def search_drafts(
    target: ElasticLM,
    text: Text,
    *,
    family: Iterable[Granularity] = (),
    num_confirmed: int = 3,
    num_prompts: int = 12,
    num_rounds: int = 3,
    dtype: str = "",
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> Result:
    """Find the fastest drafts of a model on this machine.

    Args:
        target: the model as it decodes, in its dtype and on its device.
        text: of the model under each law to search for.
        family: members to consider besides those of `list_candidates`.
        num_confirmed: drafts of each law that really decode.
        num_prompts: of the text's, that they continue by as many tokens as the text has.
        num_rounds: times that they do.
        dtype: the target's, for labels.
        clock: of the timings.
        progress: is told how far the work is.
    """
    progress = progress or _ignore
    progress("timing the target", 0, 1)
    measured = Measurements(target, text, clock)
    granularities = [
        one for one in list_candidates(target.config, family) if _may_pay(measured, _share(measured, one))
    ]
    _try_all(measured, [Candidate(granularity=one) for one in granularities], progress)
    num_tried = len({candidate for candidate, _ in measured.kept})
    _try_variants(measured, progress)
    # Of many drafts the one that was timed luckiest comes out first: the best are timed once more, and so is
    # the target: others on this machine may have changed its pace meanwhile.
    progress("timing the best", 0, 1)
    finalists = _leaders(measured, num_confirmed + 1)
    measured.time_target()
    if finalists:
        measured.time(finalists)
    ranked = measured.estimates()
    best = {params: best_of(ranked, params, num_confirmed) + _coupled(ranked, params) for params in text.rows}
    confirmed, runs = confirm(measured, best, num_prompts, num_rounds, dtype, progress)
    return Result(
        estimates=ranked,
        confirmed=confirmed,
        slowdown={m: seconds / measured.target_seconds[1] for m, seconds in measured.target_seconds.items()},
        num_candidates=len(granularities),
        num_tried=num_tried,
        busy_rounds=sum(runs.busy),
    )


def _ignore(what: str, done: int, total: int) -> None:
    del what, done, total


def _try_all(measured: Measurements, candidates: Sequence[Candidate], progress: Progress) -> None:
    """Time all and measure, from the cheapest on, those that could still be among the best."""
    progress("timing drafts", 0, 1)
    measured.time(candidates)
    for number, candidate in enumerate(sorted(candidates, key=measured.step)):
        progress("trying drafts", number, len(candidates))
        if _may_lead(measured, candidate):
            measured.measure(candidate, FIRST_TOKENS)


def _try_variants(measured: Measurements, progress: Progress) -> None:
    """Measure the best on all the text, and in other precisions, and the best of these with fewer tokens."""
    first = _leaders(measured, NUM_FINALISTS)
    measured.kept.clear()  # what is left out from here on is out: its figures are rough
    whole = Candidate(granularity=FULL)
    variants = {
        dataclasses.replace(one, precision=precision): one
        for one in (*first, whole)
        for precision in PRECISIONS
    }
    for number, candidate in enumerate(first):
        progress("measuring the best", number, len(first))
        measured.measure(candidate)
    _try_cheaper(measured, variants, progress, "trying precisions")
    best = _leaders(measured, NUM_CUT)
    counts = _vocabularies(measured.text.counts_V)
    cut = {dataclasses.replace(one, num_tokens=number): one for one in best for number in counts}
    _try_cheaper(measured, cut, progress, "trying vocabularies")


def _try_cheaper(
    measured: Measurements, originals: Mapping[Candidate, Candidate], progress: Progress, what: str
) -> None:
    """Time variants beside their originals, and measure those that are cheaper and could lead.

    A variant computes the same with less care: it is no better a draft than its original.
    """
    progress(what, 0, 1)
    usable = {one: original for one, original in originals.items() if _runs_here(measured, one)}
    measured.time(list(dict.fromkeys([*usable.values(), *usable])))
    for number, (variant, original) in enumerate(usable.items()):
        progress(what, number, len(usable))
        is_cheaper = measured.step(variant) < CHEAPER * measured.step(original)
        if is_cheaper and _may_lead(measured, variant, like=original):
            measured.measure(variant)


def _runs_here(measured: Measurements, candidate: Candidate) -> bool:
    try:
        measured.scorer(candidate)
    except UsageError:  # a precision that this device has no kernels for
        return False
    return True


def _bound(
    measured: Measurements, step: DraftCosts, params: SamplingParams, like: Candidate | None = None
) -> float:
    """The speed of a draft whose step costs so much, if it is perfect, or as good as another one."""
    verifier = verifiers_of(params)[0]
    kept = None if like is None else measured.kept.get((like, params))
    return max(
        round_speedup(
            gamma + 1.0 if kept is None else kept.tokens[verifier][gamma],
            gamma,
            *measured.costs(step, gamma, params, verifier),
        )
        for gamma in measured.gammas
    )


def _may_lead(measured: Measurements, candidate: Candidate, like: Candidate | None = None) -> bool:
    """Whether it could be among the best drafts of some law."""
    estimates = measured.estimates()
    for params in measured.text.rows:
        leaders = best_of(estimates, params, NUM_FINALISTS)
        least = leaders[-1].speedup if len(leaders) == NUM_FINALISTS else LEAST_SPEEDUP
        if _bound(measured, measured.steps[candidate, params, "block"], params, like) > least:
            return True
    return False


def _may_pay(measured: Measurements, step: DraftCosts) -> bool:
    """Whether a perfect draft of that cost would be worth it under some law."""
    return any(_bound(measured, step, params) >= LEAST_SPEEDUP for params in measured.text.rows)


def _share(measured: Measurements, granularity: Granularity) -> DraftCosts:
    """Operations of a draft's step, in target passes: it hardly ever takes less time than that."""
    config = measured.target.config
    ours, all_of_it = (count_flops(config, one, num_cached=NUM_CACHED) for one in (granularity, FULL))
    return DraftCosts(first=ours / all_of_it, more=ours / all_of_it)


def _vocabularies(counts_V: Tensor) -> list[int]:
    """How many tokens a draft may be left with: halves and quarters, and what covers most of a text."""
    vocab_size = len(counts_V)
    covered_V = counts_V.sort(descending=True).values.double().cumsum(0) / counts_V.sum()
    found = {vocab_size // 2, vocab_size // 4}
    found |= {-(-(int((covered_V < share).sum()) + 1) // 64) * 64 for share in COVERAGES}
    return sorted(num for num in found if 0 < num <= 0.75 * vocab_size)


def _leaders(measured: Measurements, count: int) -> list[Candidate]:
    """The best drafts of each law, each once."""
    estimates = measured.estimates()
    found = [one.candidate for params in measured.text.rows for one in best_of(estimates, params, count)]
    return list(dict.fromkeys(found))


def _coupled(ranked: Iterable[Estimate], params: SamplingParams) -> list[Estimate]:
    """The fastest draft for those who need text that does not depend on it."""
    return [one for one in ranked if (one.params, one.verifier) == (params, COUPLED)][:1]


def choices(result: Result, counts_V: Tensor) -> list[Found]:
    """What `--draft auto` is to take, for each law and verifier, the best verifier of a law first.

    Of confirmed drafts the fastest, else the one that should be; plain decoding where it is as fast.

    Args:
        result: of a search.
        counts_V: of its text.
    """
    found = []
    for params in dict.fromkeys(one.params for one in result.confirmed):
        of_law = [_choice(result, params, verifier, counts_V) for verifier in verifiers_of(params)]
        found += sorted(of_law, key=lambda one: (one.verifier == COUPLED, -(one.measured or 0.0)))
    return found


def _choice(result: Result, params: SamplingParams, verifier: str, counts_V: Tensor) -> Found:
    estimates = [one for one in result.estimates if (one.params, one.verifier) == (params, verifier)]
    confirmed = {one.estimate: one.speedup for one in result.confirmed if one.estimate in estimates}
    best = max(confirmed, key=confirmed.__getitem__) if confirmed else next(iter(estimates), None)
    plain = Found(
        temperature=params.temperature, verifier=verifier, draft=PLAIN, vocabulary=None, gamma=0,
        predicted=1.0, measured=None,
    )  # fmt: skip
    if best is None:
        return plain
    measured = confirmed.get(best)
    if (best.speedup if measured is None else measured) < LEAST_SPEEDUP:
        return plain
    few = best.candidate.num_tokens
    return dataclasses.replace(
        plain,
        draft=best.candidate.draft,
        vocabulary=None if few is None else tuple(most_frequent(counts_V, few).tolist()),
        gamma=best.gamma,
        predicted=best.speedup,
        measured=measured,
    )
