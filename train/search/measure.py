"""What a search has measured so far, and the speed of each draft that follows from it by arithmetic.

    costs        v(m), c of every candidate and the host's share, each timed in turn
    (models/decode/tune/timing.py) acceptance   on text that the target writes under each law
    (models/measure/acceptance.py)

The speed over plain decoding is that of models/decode/tune/predict.py with tokens per round as measured, c
and v with the host's share in them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TypeAlias

from torch import Tensor

from models.base.stopwatch import Clock
from models.decode.engine.costs import DraftCosts
from models.decode.engine.trimmed_head import FewTokens, most_frequent
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED, VERIFIER_NAMES
from models.decode.tune.predict import DRAFT_STEPS, round_speedup
from models.decode.tune.timing import time_drafts, time_hosts, time_target
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.acceptance import continue_rows, measure_acceptance
from models.packed.quantize import pack
from train.search.candidates import Candidate

Progress: TypeAlias = Callable[[str, int, int], None]
"""What is being done, how many parts of it are done, and of how many."""

MOST_TOKENS = 32
"""v(m) is measured up to here."""
GAMMAS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 19, 23, 31)
SECONDS = 3.0
"""For each timing."""


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


def continue_text(
    target: ElasticLM, prompts_RP: Tensor, num_new: int, laws: Iterable[SamplingParams], counts_V: Tensor
) -> Text:
    """Let the target continue the prompts under each law."""
    rows = {params: continue_rows(target, prompts_RP, num_new, params) for params in laws}
    return Text(num_prompt=prompts_RP.shape[1], rows=rows, counts_V=counts_V)


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


@dataclass(frozen=True)
class _Kept:
    """What acceptance comes to: alpha, and for each verifier gamma -> tokens of a round."""

    alpha: float
    tokens: Mapping[str, Mapping[int, float]]


class Measurements:
    """Measurements so far, and what follows from them."""

    def __init__(self, target: ElasticLM, text: Text, clock: Clock) -> None:
        self.target, self.text, self.clock = target, text, clock
        self.kinds = [(params, verifier) for params in text.rows for verifier in verifiers_of(params)]
        self.time_target()
        self.gammas = [
            gamma for gamma in GAMMAS if gamma + 1 in self.target_seconds and 2 * gamma <= text.num_new
        ]
        self.packed: dict[str, ElasticLM] = {}
        self.views: dict[tuple[Granularity, str | None], View] = {}
        self.steps: dict[tuple[Candidate, SamplingParams, str], DraftCosts] = {}
        """Of each draft, under each law and verifier that it drafts for."""
        self.kept: dict[tuple[Candidate, SamplingParams], _Kept] = {}

    def time_target(self) -> None:
        """Time the target's passes and what the host does with them: now, whatever was measured before."""
        self.target_seconds = time_target(self.target, MOST_TOKENS, budget=SECONDS, clock=self.clock)
        self.hosts = time_hosts(self.target, self.kinds, budget=SECONDS, clock=self.clock)

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

    def time(self, candidates: Sequence[Candidate]) -> None:
        """Time a step of each, side by side."""
        scorers = {str(one): self.scorer(one) for one in candidates}
        for params, verifier in dict.fromkeys((params, drafts_as(name)) for params, name in self.kinds):
            steps = time_drafts(self.target, scorers, params, verifier, budget=SECONDS, clock=self.clock)
            self.steps |= {(one, params, verifier): steps[str(one)] for one in candidates}

    def step(self, candidate: Candidate) -> float:
        """What candidates are compared by: a drafted token's cost, the mean over the laws."""
        return mean(self.steps[candidate, params, "block"](DRAFT_STEPS) for params in self.text.rows)

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
            tokens = {name: acceptance.tokens_per_round(name, self.gammas) for name in verifiers_of(params)}
            self.kept[candidate, params] = _Kept(acceptance.alpha, tokens)

    def estimates(self) -> list[Estimate]:
        """Of every draft that was measured, under each law and verifier, the fastest first."""
        found = [
            max(self._estimates(candidate, params, verifier), key=lambda one: one.speedup)
            for candidate, params in self.kept
            for verifier in verifiers_of(params)
        ]
        return sorted(found, key=lambda one: -one.speedup)

    def _estimates(self, candidate: Candidate, params: SamplingParams, verifier: str) -> list[Estimate]:
        kept = self.kept[candidate, params]
        step = self.steps[candidate, params, drafts_as(verifier)]
        costs = {gamma: self.costs(step, gamma, params, verifier) for gamma in self.gammas}
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

    def costs(
        self, step: DraftCosts, gamma: int, params: SamplingParams, verifier: str
    ) -> tuple[float, float]:
        """C and v of a round, in plain tokens, what the host does included."""
        one, host = self.target_seconds[1], self.hosts[params, verifier]
        plain = one + self.hosts[params, verifiers_of(params)[0]](0)
        return step(gamma) * one / plain, (self.target_seconds[gamma + 1] + host(gamma)) / plain


def drafts_as(verifier: str) -> str:
    """The verifier for which a draft does the same: only `coupled` has noise for it."""
    return COUPLED if verifier == COUPLED else "block"


def verifiers_of(params: SamplingParams) -> tuple[str, ...]:
    """Greedy decoding has no use for one."""
    return (
        ("block",) if params.is_greedy else ("block", *(name for name in VERIFIER_NAMES if name != "block"))
    )


def best_of(estimates: Iterable[Estimate], params: SamplingParams, count: int) -> list[Estimate]:
    """The fastest drafts of a law, each by its best verifier but `coupled`, whose output is another."""
    of_law = [one for one in estimates if one.params == params and one.verifier != COUPLED]
    best: dict[Candidate, Estimate] = {}
    for one in sorted(of_law, key=lambda one: -one.speedup):
        best.setdefault(one.candidate, one)
    return list(best.values())[:count]
