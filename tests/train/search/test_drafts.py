"""The search on a tiny model, by a clock that counts layers: what it finds follows from arithmetic."""

import dataclasses

import pytest
import torch

from models.decode.engine.costs import DraftCosts
from models.decode.sampling.params import SamplingParams
from models.decode.tune.draft_plan import DraftPlan, DraftSpec, Speed
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from train.search import drafts, measure
from train.search.confirm import Confirmed
from train.search.drafts import Result, choices, search_drafts
from train.search.measure import Prediction, Text, continue_text

GREEDY, WARM = SamplingParams(), SamplingParams(temperature=1.0)
COUNTS_V = torch.arange(64)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time for timings, and no packed copies, which the clock would not see."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(drafts, "PRECISIONS", ())


class LayerClock:
    """Counts passes through layers, whatever their tokens: a machine on which v(m) is 1."""

    def __init__(self, model: ElasticLM) -> None:
        self.count = 0.0
        for block in model.model.layers:
            block.register_forward_hook(self.hook)

    def hook(self, *_: object) -> None:
        self.count += 1

    def __call__(self) -> float:
        return self.count


@pytest.fixture
def model(tiny_model: ElasticLM) -> ElasticLM:
    """The last two layers hardly change anything, so that the first two draft very well."""
    for name, parameter in tiny_model.named_parameters():
        if name.startswith(("model.layers.2", "model.layers.3")) and (
            "o_proj" in name or "down_proj" in name
        ):
            parameter.data *= 0.01
    return tiny_model


def text_for(model: ElasticLM, *samplings: SamplingParams) -> Text:
    prompts_RP = torch.randint(0, 64, (8, 4))
    return continue_text(model, prompts_RP, 24, samplings, COUNTS_V)


@pytest.fixture
def result(model: ElasticLM) -> Result:
    told: list[tuple[str, int, int]] = []
    found = search_drafts(
        model,
        text_for(model, GREEDY, WARM),
        num_confirmed=2,
        num_prompts=2,
        num_rounds=1,
        dtype="fp32",
        clock=LayerClock(model),
        progress=lambda *one: told.append(one),
    )
    assert {what for what, _, _ in told} > {"timing the target", "trying drafts", "decoding"}
    assert all(done <= total for _, done, total in told)
    return found


def test_it_finds_the_layers_that_matter_and_says_what_real_decoding_makes_of_them(result: Result) -> None:
    best = {
        params: next(one for one in result.predictions if one.params == params) for params in (GREEDY, WARM)
    }
    for prediction in best.values():
        assert prediction.spec.member == "layers=0-1"
        assert prediction.c == pytest.approx(0.5)
        assert prediction.alpha > 0.9
        assert prediction.plan.speed.predicted == pytest.approx(
            prediction.tau / (prediction.plan.gamma * prediction.c + prediction.v)
        )
    assert result.slowdown == dict.fromkeys(range(1, 33), 1.0)
    confirmed = [one for one in result.confirmed if one.prediction]
    assert {one.params for one in confirmed} == {GREEDY, WARM}
    for one in confirmed:
        assert one.prediction is not None
        # Two prompts of 24 tokens, whose last round may be cut.
        assert one.tau == pytest.approx(one.prediction.tau, rel=0.4)
    plain = [one for one in result.confirmed if one.prediction is None]
    assert [(one.params, one.speedup, one.tau) for one in plain] == [(GREEDY, 1.0, 1.0), (WARM, 1.0, 1.0)]


def test_what_cannot_lead_is_not_tried(result: Result) -> None:
    assert 0 < result.num_tried < result.num_candidates


def test_estimates_are_told_for_every_verifier_of_a_distribution_the_fastest_first(result: Result) -> None:
    names = {
        params: {one.plan.verifier for one in result.predictions if one.params == params}
        for params in (GREEDY, WARM)
    }
    assert names == {GREEDY: {"block"}, WARM: {"token", "block", "coupled"}}
    speeds = [one.plan.speed.predicted for one in result.predictions]
    assert speeds == sorted(speeds, reverse=True)


def test_each_draft_of_a_distribution_is_confirmed_once_and_the_best_coupled_one_as_well(
    result: Result,
) -> None:
    warm = [one.prediction for one in result.confirmed if one.params == WARM and one.prediction]
    assert [one.plan.verifier == "coupled" for one in warm] == [False, False, True]
    assert warm[0].spec != warm[1].spec


def test_the_best_drafts_are_tried_in_other_precisions_and_with_fewer_tokens(
    model: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where int8 costs half, and half of the vocabulary half of that."""

    def cost(name: str) -> DraftCosts:
        layers = Granularity.parse(name.partition(",")[0].partition("@")[0]).layers or range(4)
        half = 0.5 if "@int8" in name else 1.0
        share = len(layers) / 4 * half * (0.5 if "32 tokens" in name else 1.0)
        return DraftCosts(first=share, more=share)

    monkeypatch.setattr(drafts, "PRECISIONS", ("fp32", "int8"))
    monkeypatch.setattr(
        measure, "time_drafts", lambda _, scorers, *__, **___: {name: cost(name) for name in scorers}
    )
    monkeypatch.setattr(
        drafts, "list_candidates", lambda *_: [Granularity.parse(text) for text in ("layers=0", "layers=0-1")]
    )
    found = search_drafts(
        model, text_for(model, GREEDY), num_prompts=1, num_rounds=1, clock=LayerClock(model)
    )
    texts = [str(one.spec) for one in found.predictions]
    assert {"layers=0-1", "layers=0-1@int8", "full@int8", "layers=0-1@int8, 32 tokens"} <= set(texts)
    assert not any("fp32" in text or "16 tokens" in text for text in texts), "these are no cheaper"
    assert len(found.confirmed) == 4


def prediction(verifier: str = "block", params: SamplingParams = WARM, tau: float = 2.0) -> Prediction:
    spec = DraftSpec(member="layers=0", vocabulary=(1, 3))
    plan = DraftPlan(spec=spec, gamma=2, verifier=verifier, speed=Speed(tau / 1.2))
    return Prediction(params=params, plan=plan, alpha=0.8, tau=tau, c=0.1, v=1.0)


def confirmed(one: Prediction | None, speedup: float, params: SamplingParams = WARM) -> Confirmed:
    return Confirmed(
        prediction=one, params=params, speedup=speedup, tau=1.0, alpha=None, tokens_per_second=100.0
    )


def result_of(predictions: list[Prediction], speeds: list[Confirmed]) -> Result:
    return Result(
        predictions=predictions,
        confirmed=[confirmed(None, 1.0), *speeds],
        slowdown={1: 1.0},
        num_candidates=1,
        num_tried=1,
        busy_rounds=0,
    )


def test_what_was_confirmed_is_chosen_by_its_measured_speed_and_the_rest_by_prediction() -> None:
    fast, slow, token = prediction(tau=2.4), prediction(tau=2.0), prediction("token", tau=1.8)
    slow = dataclasses.replace(slow, plan=dataclasses.replace(slow.plan, gamma=1))
    found = choices(result_of([fast, slow, token], [confirmed(fast, 1.2), confirmed(slow, 1.5)]))
    assert list(found) == [1.0]
    block, by_token, coupled = found[1.0]
    assert [block.verifier, by_token.verifier, coupled.verifier] == ["block", "token", "coupled"]
    assert (block.gamma, block.speed.measured) == (1, 1.5)
    assert block.spec == slow.spec
    assert by_token.speed.measured is None
    assert by_token.speed.predicted == pytest.approx(1.5)
    assert coupled.spec is None, "nothing is known of it"


def test_plain_decoding_is_chosen_where_no_draft_is_faster() -> None:
    disappointing = prediction(tau=2.4)
    (block, *_) = choices(result_of([disappointing], [confirmed(disappointing, 0.97)]))[1.0]
    assert (block.spec, block.gamma) == (None, 0)


def test_vocabularies_are_fractions_and_what_covers_a_text() -> None:
    counts_V = torch.zeros(4096)
    counts_V[:100] = 1000
    counts_V[100:1000] = 5
    assert drafts._vocabulary_sizes(counts_V) == [128, 832, 1024, 2048]
