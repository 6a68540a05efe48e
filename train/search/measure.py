"""Measurements of a search so far, and the speed of each draft that follows by arithmetic.

    costs        v(m), c of every draft and what the host does, timed in turn (models/decode/tune/timing.py)
    acceptance   on text that the target writes at each temperature (models/measure/acceptance.py)

The speed over plain decoding is that of models/decode/tune/predict.py with tokens per round as measured, and
with what the host does in c and v.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TypeAlias

import torch
from torch import Tensor

from models.base.stopwatch import Clock
from models.decode.engine.costs import DraftCosts
from models.decode.engine.trimmed_head import TrimmedHead
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED, VERIFIER_NAMES
from models.decode.tune.draft_plan import DraftPlan, DraftSpec, Speed
from models.decode.tune.predict import DRAFT_STEPS, round_speedup
from models.decode.tune.timing import time_drafts, time_hosts, time_target
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.acceptance import continue_rows, measure_acceptance
from models.packed.quantize import pack

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being done, the number of parts that are done, and of how many."""

MOST_TOKENS = 32
"""The largest m for which v(m) is measured."""
GAMMAS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 19, 23, 31)
SECONDS = 3.0
"""Budget of each timing."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text that acceptance is measured on: prompts, continued by the target at each temperature."""

    num_prompt: int
    """Tokens of a prompt, P."""
    rows: Mapping[SamplingParams, Tensor]
    """Tokens [R, T] for each sampling, the prompts first."""
    counts_V: Tensor
    """Counts of each token in the whole calibration text."""

    @property
    def num_new(self) -> int:
        """N, tokens of each row that the target wrote."""
        return next(iter(self.rows.values())).shape[1] - self.num_prompt

    def first(self, params: SamplingParams, num_tokens: int) -> Tensor:
        """Return as many rows as have `num_tokens` new tokens."""
        return self.rows[params][: math.ceil(num_tokens / self.num_new)]


def continue_text(
    target: ElasticLM, prompts_RP: Tensor, num_new: int, samplings: Iterable[SamplingParams], counts_V: Tensor
) -> Text:
    """Let the target continue the prompts under each temperature."""
    rows = {params: continue_rows(target, prompts_RP, num_new, params) for params in samplings}
    return Text(num_prompt=prompts_RP.shape[1], rows=rows, counts_V=counts_V)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The speed that the measurements predict for one draft, temperature and verifier, at the best gamma."""

    params: SamplingParams
    plan: DraftPlan
    alpha: float
    """Expected acceptance of one drafted token; greedy: the fraction of equal tokens."""
    tau: float
    """Tokens per round."""
    c: float
    """Cost of a drafted token in plain tokens, what the host does included."""
    v: float
    """Cost of a target pass on gamma + 1 tokens and its verification, in plain tokens."""

    @property
    def spec(self) -> DraftSpec:
        """The draft."""
        assert self.plan.spec is not None
        return self.plan.spec


@dataclass(frozen=True)
class _Kept:
    """Acceptance: alpha, and for each verifier gamma -> tokens of a round."""

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
        self.views: dict[tuple[str, str | None], View] = {}
        self.steps: dict[tuple[DraftSpec, SamplingParams, str], DraftCosts] = {}
        """Cost of each draft at each temperature and for each verifier."""
        self.kept: dict[tuple[DraftSpec, SamplingParams], _Kept] = {}

    def time_target(self) -> None:
        """Time the target's passes and what the host does with them: now, whatever was measured before."""
        self.target_seconds = time_target(self.target, MOST_TOKENS, budget=SECONDS, clock=self.clock)
        self.hosts = time_hosts(self.target, self.kinds, budget=SECONDS, clock=self.clock)

    def scorer(self, candidate: DraftSpec) -> View | TrimmedHead:
        """Return what drafts; views of a precision share one packed copy.

        Raises:
            UsageError: if the precision does not run here.
        """
        key = candidate.member, candidate.precision
        if key not in self.views:
            granularity, model = Granularity.parse(candidate.member), self.target
            if candidate.precision is not None:
                if candidate.precision not in self.packed:
                    self.packed[candidate.precision] = pack(self.target, candidate.precision, granularity)
                model = self.packed[candidate.precision]
            self.views[key] = View(model, granularity)
        view = self.views[key]
        return view if candidate.vocabulary is None else TrimmedHead(view, torch.tensor(candidate.vocabulary))

    def time(self, candidates: Sequence[DraftSpec]) -> None:
        """Time a step of each, side by side."""
        scorers = {str(one): self.scorer(one) for one in candidates}
        for params, verifier in dict.fromkeys((params, drafts_as(name)) for params, name in self.kinds):
            steps = time_drafts(self.target, scorers, params, verifier, budget=SECONDS, clock=self.clock)
            self.steps |= {(one, params, verifier): steps[str(one)] for one in candidates}

    def step(self, candidate: DraftSpec) -> float:
        """Return the cost by which candidates are compared: a drafted token's, the mean over temperatures."""
        return mean(self.steps[candidate, params, "block"](DRAFT_STEPS) for params in self.text.rows)

    def measure(self, candidate: DraftSpec, num_tokens: int | None = None) -> None:
        """Measure acceptance under each temperature, on the first `num_tokens` or on all."""
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

    def predictions(self) -> list[Prediction]:
        """Return predictions of every measured draft, temperature and verifier, the fastest first."""
        found = [
            max(self._predictions(candidate, params, verifier), key=_predicted)
            for candidate, params in self.kept
            for verifier in verifiers_of(params)
        ]
        return sorted(found, key=_predicted, reverse=True)

    def _predictions(self, candidate: DraftSpec, params: SamplingParams, verifier: str) -> list[Prediction]:
        kept = self.kept[candidate, params]
        step = self.steps[candidate, params, drafts_as(verifier)]
        found = []
        for gamma in self.gammas:
            tau, (c, v) = kept.tokens[verifier][gamma], self.costs(step, gamma, params, verifier)
            speed = Speed(round_speedup(tau, gamma, c, v))
            plan = DraftPlan(spec=candidate, gamma=gamma, verifier=verifier, speed=speed)
            found.append(Prediction(params=params, plan=plan, alpha=kept.alpha, tau=tau, c=c, v=v))
        return found

    def costs(
        self, step: DraftCosts, gamma: int, params: SamplingParams, verifier: str
    ) -> tuple[float, float]:
        """Return c and v of a round, in plain tokens, what the host does included."""
        one, host = self.target_seconds[1], self.hosts[params, verifier]
        plain = one + self.hosts[params, verifiers_of(params)[0]](0)
        return step(gamma) * one / plain, (self.target_seconds[gamma + 1] + host(gamma)) / plain


def drafts_as(verifier: str) -> str:
    """Return the verifier for which a draft does the same: only `coupled` has noise for it."""
    return COUPLED if verifier == COUPLED else "block"


def verifiers_of(params: SamplingParams) -> tuple[str, ...]:
    """Return the verifiers to search for; greedy decoding has no use for them."""
    return (
        ("block",) if params.is_greedy else ("block", *(name for name in VERIFIER_NAMES if name != "block"))
    )


def best_of(predictions: Iterable[Prediction], params: SamplingParams, count: int) -> list[Prediction]:
    """Return the fastest drafts of a temperature, verified by anything but `coupled` (another text)."""
    fitting = [one for one in predictions if one.params == params and one.plan.verifier != COUPLED]
    best: dict[DraftSpec, Prediction] = {}
    for one in sorted(fitting, key=_predicted, reverse=True):
        best.setdefault(one.spec, one)
    return list(best.values())[:count]


def _predicted(one: Prediction) -> float:
    return one.plan.speed.predicted
