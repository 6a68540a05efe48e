"""The draft is a choice made after training, for one machine: which member, how stored, how many tokens.

    arithmetic   candidates by their operations, the cheapest first (models/count.py)
    costs        v(m), c of every candidate, and the host's share, each timed in turn (models/decode/costs.py)
    acceptance   on a little text, and only while a perfect draft of that cost could still win
    variants     the few best in other precisions, and the best of these with a part of the vocabulary
    decoding     the few best of all and plain, in turn, on prompts of the same text (models/bench/run.py)

The speed over plain decoding is that of models/decode/auto.py with tokens per round as measured, c and v
with the host's share in them. Greedy decoding and each temperature are searched for by themselves: another
draft may be best. Nothing here touches what is written, only how fast.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.bench.engines import Engine, OurEngine
from models.bench.matrix import Cell, Label
from models.bench.report import make_rows
from models.bench.run import Runs, run_cells
from models.count import count_flops
from models.decode.auto import LEAST_SPEEDUP, round_speedup
from models.decode.choose import COUPLED, VERIFIER_NAMES
from models.decode.costs import time_drafts, time_hosts, time_target
from models.decode.draft import NestedDraft
from models.decode.sampling import SamplingParams
from models.decode.searched import PLAIN, Found
from models.decode.vocabulary import FewTokens, most_frequent
from models.elastic import ElasticLM
from models.errors import UsageError
from models.granularity import FULL, Granularity
from models.measure.acceptance import continue_rows, measure_acceptance
from models.probe import Clock
from models.quantize import INT8, pack
from models.view import View
from train.candidates import NUM_CACHED, Candidate, list_candidates

Progress: TypeAlias = Callable[[str, int, int], None]
"""What is being done, how many parts of it are done, and of how many."""

MOST_TOKENS = 32
"""v(m) is measured up to here."""
GAMMAS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 19, 23, 31)
DRAFT_STEPS = 4
PRECISIONS = ("fp32", "bf16", INT8)
FIRST_TOKENS = 600
"""Of the text that every candidate is tried on."""
NUM_FINALISTS = 4
NUM_CUT = 2
"""Drafts whose vocabulary is tried cut."""
CHEAPER = 0.97
"""A variant that costs more than this share of the original is no gain."""
COVERAGES = (0.95, 0.99)
SECONDS = 1.5
"""For each timing."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What arithmetic makes of the measurements: one draft under one law and verifier, at its best gamma."""

    candidate: Candidate
    params: SamplingParams
    verifier: str
    gamma: int
    alpha: float
    """Expected acceptance of one drafted token; greedy: the share of equal tokens."""
    tau: float
    """Tokens per round."""
    c: float
    """A drafted token's cost, the host's share included, in plain tokens."""
    v: float
    """A target pass on gamma + 1 tokens and its verdict, in plain tokens."""

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return round_speedup(self.tau, self.gamma, self.c, self.v)


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """An estimate, or plain decoding, and what real decoding made of it."""

    estimate: Estimate | None
    params: SamplingParams
    speedup: float
    """Over plain decoding, after the first token."""
    tau: float
    alpha: float | None
    tokens_per_second: float
    """After the first token."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """What acceptance is measured on: for each law prompts, continued by the target under it."""

    num_prompt: int
    """P, tokens of a prompt."""
    rows: Mapping[SamplingParams, Tensor]
    """[R, T], the prompts first."""
    counts_V: Tensor
    """How often each token comes in the whole calibration text."""

    @property
    def num_new(self) -> int:
        """N, tokens of each row that the target wrote."""
        return next(iter(self.rows.values())).shape[1] - self.num_prompt

    def first(self, params: SamplingParams, num_tokens: int) -> Tensor:
        """As many rows as have so many new tokens."""
        return self.rows[params][: math.ceil(num_tokens / self.num_new)]


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


def continue_text(
    target: ElasticLM, prompts_RP: Tensor, num_new: int, laws: Iterable[SamplingParams], counts_V: Tensor
) -> Text:
    """Let the target continue the prompts under each law."""
    rows = {params: continue_rows(target, prompts_RP, num_new, params) for params in laws}
    return Text(num_prompt=prompts_RP.shape[1], rows=rows, counts_V=counts_V)


def search_drafts(
    target: ElasticLM,
    text: Text,
    *,
    family: Iterable[Granularity] = (),
    num_confirmed: int = 3,
    num_prompts: int = 6,
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
    bench = _Bench(target, text, clock)
    granularities = [one for one in list_candidates(target.config, family) if bench.may_pay(bench.share(one))]
    _try_all(bench, [Candidate(granularity=one) for one in granularities], progress)
    num_tried = len({candidate for candidate, _ in bench.kept})
    _try_variants(bench, progress)
    # Of many drafts the one that was timed luckiest comes out first: the best are timed once more.
    progress("timing the best", 0, 1)
    finalists = _leaders(bench, num_confirmed + 1)
    if finalists:
        bench.time(finalists)
    ranked = bench.estimates()
    best = {params: _best(ranked, params, num_confirmed) + _coupled(ranked, params) for params in text.rows}
    confirmed, runs = _confirm(bench, best, num_prompts, num_rounds, dtype, progress)
    return Result(
        estimates=ranked,
        confirmed=confirmed,
        slowdown={m: seconds / bench.target_seconds[1] for m, seconds in bench.target_seconds.items()},
        num_candidates=len(granularities),
        num_tried=num_tried,
        busy_rounds=sum(runs.busy),
    )


def _ignore(what: str, done: int, total: int) -> None:
    del what, done, total


def choices(result: Result, counts_V: Tensor) -> list[Found]:
    """What `--draft auto` is to take, for each law and verifier, the best verifier of a law first.

    Of confirmed drafts the fastest, else the one that should be; plain decoding where it is as fast.

    Args:
        result: of a search.
        counts_V: of its text.
    """
    found = []
    for params in dict.fromkeys(one.params for one in result.confirmed):
        of_law = [_choice(result, params, verifier, counts_V) for verifier in _verifiers(params)]
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


@dataclass(frozen=True)
class _Kept:
    """What acceptance comes to: alpha, and for each verifier gamma -> tokens of a round."""

    alpha: float
    tokens: Mapping[str, Mapping[int, float]]


class _Bench:
    """Measurements so far, and what follows from them."""

    def __init__(self, target: ElasticLM, text: Text, clock: Clock) -> None:
        self.target, self.text, self.clock = target, text, clock
        self.target_seconds = time_target(target, MOST_TOKENS, budget=SECONDS, clock=clock)
        kinds = [(params, verifier) for params in text.rows for verifier in _verifiers(params)]
        self.hosts = time_hosts(target, kinds, budget=SECONDS, clock=clock)
        self.gammas = [
            gamma for gamma in GAMMAS if gamma + 1 in self.target_seconds and 2 * gamma <= text.num_new
        ]
        self.packed: dict[str, ElasticLM] = {}
        self.views: dict[tuple[Granularity, str | None], View] = {}
        self.steps: dict[Candidate, float] = {}
        """Of each draft, in target passes on one token."""
        self.kept: dict[tuple[Candidate, SamplingParams], _Kept] = {}

    def scorer(self, candidate: Candidate) -> View | FewTokens:
        """What drafts; views of a precision share one packed copy.

        Raises:
            UsageError: if the precision does not run here.
        """
        granularity, precision = candidate.granularity, candidate.precision
        if (granularity, precision) not in self.views:
            model = self.target
            if precision is not None:
                if precision not in self.packed:
                    self.packed[precision] = pack(self.target, precision, granularity)
                model = self.packed[precision]
            self.views[granularity, precision] = View(model, granularity)
        view = self.views[granularity, precision]
        if candidate.num_tokens is None:
            return view
        return FewTokens(view, most_frequent(self.text.counts_V, candidate.num_tokens))

    def engine(self, params: SamplingParams, estimate: Estimate | None) -> Engine:
        """Decodes as an estimate says, or plainly."""
        if estimate is None:
            return OurEngine(model=self.target, params=params)
        candidate = estimate.candidate
        view = self.views[candidate.granularity, candidate.precision]
        few = candidate.num_tokens
        draft = NestedDraft(view, None if few is None else most_frequent(self.text.counts_V, few))
        return OurEngine(
            model=self.target,
            params=params,
            new_draft=lambda: draft,  # it has nothing to forget
            gamma=estimate.gamma,
            verifier=estimate.verifier,
        )

    def time(self, candidates: Sequence[Candidate]) -> None:
        """Time a step of each, side by side."""
        scorers = {str(one): self.scorer(one) for one in candidates}
        steps = time_drafts(self.target, scorers, num_steps=DRAFT_STEPS, budget=SECONDS, clock=self.clock)
        self.steps |= {one: steps[str(one)] for one in candidates}

    def measure(self, candidate: Candidate, num_tokens: int | None = None) -> None:
        """Measure acceptance under each law, on so many tokens or on all."""
        for params, rows_RT in self.text.rows.items():
            few_RT = rows_RT if num_tokens is None else self.text.first(params, num_tokens)
            acceptance = measure_acceptance(
                self.target,
                {"": self.scorer(candidate)},
                few_RT,
                params,
                num_prompt=self.text.num_prompt,
            )[""]
            tokens = {name: acceptance.tokens_per_round(name, self.gammas) for name in _verifiers(params)}
            self.kept[candidate, params] = _Kept(acceptance.alpha, tokens)

    def estimates(self) -> list[Estimate]:
        """Of every draft that was measured, under each law and verifier, the fastest first."""
        found = [
            max(self._estimates(candidate, params, verifier), key=lambda one: one.speedup)
            for candidate, params in self.kept
            for verifier in _verifiers(params)
        ]
        return sorted(found, key=lambda one: -one.speedup)

    def _estimates(self, candidate: Candidate, params: SamplingParams, verifier: str) -> list[Estimate]:
        kept = self.kept[candidate, params]
        costs = {gamma: self.costs(self.steps[candidate], gamma, params, verifier) for gamma in self.gammas}
        return [
            Estimate(
                candidate=candidate,
                params=params,
                verifier=verifier,
                gamma=gamma,
                alpha=kept.alpha,
                tau=kept.tokens[verifier][gamma],
                c=c,
                v=v,
            )
            for gamma, (c, v) in costs.items()
        ]

    def costs(self, step: float, gamma: int, params: SamplingParams, verifier: str) -> tuple[float, float]:
        """C and v of a round, in plain tokens; the host's share of plain decoding is in all of them."""
        one, host = self.target_seconds[1], self.hosts[params, verifier]
        plain = one + self.hosts[params, _verifiers(params)[0]](0)
        c = (step * one + (host(gamma) - host(0)) / gamma) / plain
        return c, (self.target_seconds[gamma + 1] + host(0)) / plain

    def bound(self, step: float, params: SamplingParams, like: Candidate | None = None) -> float:
        """The speed of a draft whose step costs so much, if it is perfect, or as good as another one."""
        verifier = _verifiers(params)[0]
        kept = None if like is None else self.kept.get((like, params))
        return max(
            round_speedup(
                gamma + 1.0 if kept is None else kept.tokens[verifier][gamma],
                gamma,
                *self.costs(step, gamma, params, verifier),
            )
            for gamma in self.gammas
        )

    def may_lead(self, candidate: Candidate, like: Candidate | None = None) -> bool:
        """Whether it could be among the best drafts of some law."""
        estimates, step = self.estimates(), self.steps[candidate]
        for params in self.text.rows:
            leaders = _best(estimates, params, NUM_FINALISTS)
            least = leaders[-1].speedup if len(leaders) == NUM_FINALISTS else LEAST_SPEEDUP
            if self.bound(step, params, like) > least:
                return True
        return False

    def may_pay(self, step: float) -> bool:
        """Whether a perfect draft of that cost would be worth it under some law."""
        return any(self.bound(step, params) >= LEAST_SPEEDUP for params in self.text.rows)

    def share(self, granularity: Granularity) -> float:
        """Operations of a draft's step, in target passes: it hardly ever takes less time than that."""
        config = self.target.config
        return count_flops(config, granularity, num_cached=NUM_CACHED) / count_flops(
            config, num_cached=NUM_CACHED
        )


def _verifiers(params: SamplingParams) -> tuple[str, ...]:
    """Greedy decoding has no use for one."""
    return (
        ("block",) if params.is_greedy else ("block", *(name for name in VERIFIER_NAMES if name != "block"))
    )


def _try_all(bench: _Bench, candidates: Sequence[Candidate], progress: Progress) -> None:
    """Time all and measure, from the cheapest on, those that could still be among the best."""
    progress("timing drafts", 0, 1)
    bench.time(candidates)
    for number, candidate in enumerate(sorted(candidates, key=bench.steps.__getitem__)):
        progress("trying drafts", number, len(candidates))
        if bench.may_lead(candidate):
            bench.measure(candidate, FIRST_TOKENS)


def _try_variants(bench: _Bench, progress: Progress) -> None:
    """Measure the best on all the text, and in other precisions, and the best of these with fewer tokens."""
    first = _leaders(bench, NUM_FINALISTS)
    bench.kept.clear()  # what is left out from here on is out: its figures are rough
    whole = Candidate(granularity=FULL)
    variants = {
        dataclasses.replace(one, precision=precision): one
        for one in (*first, whole)
        for precision in PRECISIONS
    }
    for number, candidate in enumerate(first):
        progress("measuring the best", number, len(first))
        bench.measure(candidate)
    _try_cheaper(bench, variants, progress, "trying precisions")
    best = _leaders(bench, NUM_CUT)
    counts = _vocabularies(bench.text.counts_V)
    cut = {dataclasses.replace(one, num_tokens=number): one for one in best for number in counts}
    _try_cheaper(bench, cut, progress, "trying vocabularies")


def _try_cheaper(
    bench: _Bench, originals: Mapping[Candidate, Candidate], progress: Progress, what: str
) -> None:
    """Time variants beside their originals, and measure those that are cheaper and could lead.

    A variant computes the same with less care: it is no better a draft than its original.
    """
    progress(what, 0, 1)
    usable = {one: original for one, original in originals.items() if _runs_here(bench, one)}
    bench.time(list(dict.fromkeys([*usable.values(), *usable])))
    for number, (variant, original) in enumerate(usable.items()):
        progress(what, number, len(usable))
        is_cheaper = bench.steps[variant] < CHEAPER * bench.steps[original]
        if is_cheaper and bench.may_lead(variant, like=original):
            bench.measure(variant)


def _runs_here(bench: _Bench, candidate: Candidate) -> bool:
    try:
        bench.scorer(candidate)
    except UsageError:  # a precision that this device has no kernels for
        return False
    return True


def _vocabularies(counts_V: Tensor) -> list[int]:
    """How many tokens a draft may be left with: halves and quarters, and what covers most of a text."""
    vocab_size = len(counts_V)
    covered_V = counts_V.sort(descending=True).values.double().cumsum(0) / counts_V.sum()
    found = {vocab_size // 2, vocab_size // 4}
    found |= {-(-(int((covered_V < share).sum()) + 1) // 64) * 64 for share in COVERAGES}
    return sorted(num for num in found if 0 < num <= 0.75 * vocab_size)


def _leaders(bench: _Bench, count: int) -> list[Candidate]:
    """The best drafts of each law, each once."""
    estimates = bench.estimates()
    found = [one.candidate for params in bench.text.rows for one in _best(estimates, params, count)]
    return list(dict.fromkeys(found))


def _best(estimates: Iterable[Estimate], params: SamplingParams, count: int) -> list[Estimate]:
    """The fastest drafts of a law, each by its best verifier but `coupled`, whose output is another."""
    of_law = [one for one in estimates if one.params == params and one.verifier != COUPLED]
    best: dict[Candidate, Estimate] = {}
    for one in sorted(of_law, key=lambda one: -one.speedup):
        best.setdefault(one.candidate, one)
    return list(best.values())[:count]


def _coupled(ranked: Iterable[Estimate], params: SamplingParams) -> list[Estimate]:
    """The fastest draft for those who need text that does not depend on it."""
    return [one for one in ranked if (one.params, one.verifier) == (params, COUPLED)][:1]


def _confirm(
    bench: _Bench,
    best: Mapping[SamplingParams, Sequence[Estimate]],
    num_prompts: int,
    num_rounds: int,
    dtype: str,
    progress: Progress,
) -> tuple[list[Confirmed], Runs]:
    """Decode plainly and with the best drafts, in turn, each law on the same prompts."""
    contenders = {
        _label(params, estimate, dtype): (params, estimate)
        for params, estimates in best.items()
        for estimate in (None, *estimates)
    }
    cells = [
        Cell(label=label, engine=bench.engine(*contender))
        for label, contender in contenders.items()
    ]
    rows_RT = next(iter(bench.text.rows.values()))[:num_prompts]
    prompts = rows_RT[:, : bench.text.num_prompt].tolist()
    total, done = len(cells) * (1 + num_rounds * len(prompts)), itertools.count(1)
    runs = run_cells(
        cells,
        prompts,
        max_new_tokens=bench.text.num_new,
        num_rounds=num_rounds,
        progress=lambda: progress("decoding", next(done), total),
    )
    confirmed = [
        Confirmed(
            estimate=estimate,
            params=params,
            speedup=row["decode_speedup"],
            tau=row["tau"],
            alpha=row["alpha"],
            tokens_per_second=row["decode_tokens_per_second"],
        )
        for (params, estimate), row in zip(contenders.values(), make_rows(runs), strict=True)
    ]
    return confirmed, runs


def _label(params: SamplingParams, estimate: Estimate | None, dtype: str) -> Label:
    common: dict[str, Any] = {
        "engine": "nestling",
        "dtype": dtype,
        "temperature": params.temperature,
        "threads": torch.get_num_threads(),
    }
    if estimate is None:
        return Label(**common, mode="plain")
    name = f"{estimate.candidate} by {estimate.verifier}"
    return Label(**common, mode="speculative", draft=name, gamma=estimate.gamma)
