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
from models.decode.tune.draft_plan import DraftPlan, DraftSpec, Speed
from models.decode.tune.predict import LEAST_SPEEDUP, round_speedup
from models.elastic.count import count_flops
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.packed.quantize import INT4, INT8, Q4_0
from train.search.candidates import NUM_CACHED, list_candidates
from train.search.confirm import Confirmed, confirm
from train.search.measure import Measurements, Prediction, Progress, Text, best_of, verifiers_of

PRECISIONS = ("fp32", "bf16", INT8, INT4, Q4_0)
FIRST_TOKENS = 600
"""Tokens of the text that every candidate is tried on."""
NUM_FINALISTS = 4
NUM_CUT = 2
"""Drafts whose vocabulary is tried trimmed."""
CHEAPER = 0.97
"""A variant that costs more than this fraction of the original is no gain."""
COVERAGES = (0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that was found."""

    predictions: list[Prediction]
    """The best gamma of each measured (draft, temperature, verifier), the fastest first."""
    confirmed: list[Confirmed]
    """Plain decoding, then the best drafts by predicted speed, for each temperature."""
    slowdown: dict[int, float]
    """v(m) of the target's pass alone."""
    num_candidates: int
    num_tried: int
    """Candidates whose acceptance was measured."""
    busy_rounds: int
    """Rounds of confirmation in which other programs kept the machine busy."""


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
        text: its text under each temperature to search for.
        family: members to consider besides those of `list_candidates`.
        num_confirmed: drafts of each temperature that really decode.
        num_prompts: of the text's, that they continue by as many tokens as the text has.
        num_rounds: times that they do.
        dtype: the target's, for labels.
        clock: returns the time in seconds.
        progress: called as the work goes on.
    """
    progress = progress or _ignore
    progress("timing the target", 0, 1)
    measured = Measurements(target, text, clock)
    granularities = [
        one
        for one in list_candidates(target.config, family)
        if _may_pay(measured, _operations(measured, one))
    ]
    _try_all(measured, [DraftSpec(member=str(one)) for one in granularities], progress)
    num_tried = len({candidate for candidate, _ in measured.kept})
    _try_variants(measured, progress)
    # Of many drafts the one that was timed luckiest comes out first: the best are timed once more, and so is
    # the target: others on this machine may have changed its pace meanwhile.
    progress("timing the best", 0, 1)
    finalists = _leaders(measured, num_confirmed + 1)
    measured.time_target()
    if finalists:
        measured.time(finalists)
    ranked = measured.predictions()
    best = {params: best_of(ranked, params, num_confirmed) + _coupled(ranked, params) for params in text.rows}
    confirmed, runs = confirm(measured, best, num_prompts, num_rounds, dtype, progress)
    return Result(
        predictions=ranked,
        confirmed=confirmed,
        slowdown={m: seconds / measured.target_seconds[1] for m, seconds in measured.target_seconds.items()},
        num_candidates=len(granularities),
        num_tried=num_tried,
        busy_rounds=sum(runs.busy),
    )


def _ignore(what: str, done: int, total: int) -> None:
    del what, done, total


def _try_all(measured: Measurements, candidates: Sequence[DraftSpec], progress: Progress) -> None:
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
    whole = DraftSpec(member=str(FULL))
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
    counts_V = measured.text.counts_V
    vocabularies = [tuple(most_frequent(counts_V, num).tolist()) for num in _vocabulary_sizes(counts_V)]
    cut = {dataclasses.replace(one, vocabulary=ids): one for one in best for ids in vocabularies}
    _try_cheaper(measured, cut, progress, "trying vocabularies")


def _try_cheaper(
    measured: Measurements, originals: Mapping[DraftSpec, DraftSpec], progress: Progress, what: str
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


def _runs_here(measured: Measurements, candidate: DraftSpec) -> bool:
    try:
        measured.scorer(candidate)
    except UsageError:  # a precision that this device has no kernels for
        return False
    return True


def _bound(
    measured: Measurements, step: DraftCosts, params: SamplingParams, like: DraftSpec | None = None
) -> float:
    """Return the speed of a draft whose step has this cost, if it is perfect, or as good as another one."""
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


def _may_lead(measured: Measurements, candidate: DraftSpec, like: DraftSpec | None = None) -> bool:
    """Return whether it could be among the best drafts of some temperature."""
    predictions = measured.predictions()
    for params in measured.text.rows:
        leaders = best_of(predictions, params, NUM_FINALISTS)
        least = leaders[-1].plan.speed.predicted if len(leaders) == NUM_FINALISTS else LEAST_SPEEDUP
        if _bound(measured, measured.steps[candidate, params, "block"], params, like) > least:
            return True
    return False


def _may_pay(measured: Measurements, step: DraftCosts) -> bool:
    """Return whether a perfect draft of that cost would be worth it under some temperature."""
    return any(_bound(measured, step, params) >= LEAST_SPEEDUP for params in measured.text.rows)


def _operations(measured: Measurements, granularity: Granularity) -> DraftCosts:
    """Return the operations of a draft's step, in target passes: it hardly ever takes less time."""
    config = measured.target.config
    ours, all_of_it = (count_flops(config, one, num_cached=NUM_CACHED) for one in (granularity, FULL))
    return DraftCosts(first=ours / all_of_it, more=ours / all_of_it)


def _vocabulary_sizes(counts_V: Tensor) -> list[int]:
    """Return sizes of a trimmed vocabulary: a half, a quarter, and what covers most of a text."""
    vocab_size = len(counts_V)
    covered_V = counts_V.sort(descending=True).values.double().cumsum(0) / counts_V.sum()
    found = {vocab_size // 2, vocab_size // 4}
    found |= {-(-(int((covered_V < fraction).sum()) + 1) // 64) * 64 for fraction in COVERAGES}
    return sorted(num for num in found if 0 < num <= 0.75 * vocab_size)


def _leaders(measured: Measurements, count: int) -> list[DraftSpec]:
    """Return the best drafts of each temperature, each once."""
    predictions = measured.predictions()
    found = [one.spec for params in measured.text.rows for one in best_of(predictions, params, count)]
    return list(dict.fromkeys(found))


def _coupled(ranked: Iterable[Prediction], params: SamplingParams) -> list[Prediction]:
    """Return the fastest draft for those who need text that does not depend on it."""
    return [one for one in ranked if (one.params, one.plan.verifier) == (params, COUPLED)][:1]


def choices(result: Result) -> dict[float, list[DraftPlan]]:
    """Return what `--draft auto` takes for each temperature: a plan for each verifier, the best one first.

    Of confirmed drafts it is the fastest, else the one that should be; plain decoding where it is as fast.
    """
    return {
        params.temperature: sorted(
            (_choice(result, params, verifier) for verifier in verifiers_of(params)),
            key=lambda one: (one.verifier == COUPLED, -(one.speed.measured or 0.0)),
        )
        for params in dict.fromkeys(one.params for one in result.confirmed)
    }


def _choice(result: Result, params: SamplingParams, verifier: str) -> DraftPlan:
    predictions = [one for one in result.predictions if (one.params, one.plan.verifier) == (params, verifier)]
    confirmed = {one.prediction: one.speedup for one in result.confirmed if one.prediction in predictions}
    best = max(confirmed, key=confirmed.__getitem__) if confirmed else next(iter(predictions), None)
    if best is None:
        return DraftPlan.plain(verifier)
    speed = Speed(best.plan.speed.predicted, confirmed.get(best))
    if speed.best < LEAST_SPEEDUP:
        return DraftPlan.plain(verifier)
    return dataclasses.replace(best.plan, speed=speed)
