"""Which member drafts best: the formula against a simulation, and timings of a real model."""

import random
from typing import Any

import pytest
import torch

from models.checkpoint.family import Member
from models.decode.engine.costs import Costs
from models.decode.sampling.params import SamplingParams
from models.decode.tune.predict import (
    MAX_GAMMA,
    best_num_threads,
    choose_draft,
    known_acceptance,
    measure_costs,
    speedup,
)
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View

NUM_ROUNDS = 20_000


def member(name: str, granularity: str = "ffn=0.5", **measured: Any) -> Member:
    return Member(name=name, granularity=granularity, parameters=1, **measured)


@pytest.mark.parametrize("alpha", [0.3, 0.8])
@pytest.mark.parametrize("gamma", [1, 4])
def test_the_formula_agrees_with_counting_rounds(alpha: float, gamma: int) -> None:
    generator = random.Random(0)
    num_tokens = 0
    for _ in range(NUM_ROUNDS):
        kept = next((i for i in range(gamma) if generator.random() >= alpha), gamma)
        num_tokens += kept + 1
    seconds = NUM_ROUNDS * (gamma * 0.2 + 1.1)
    assert speedup(alpha, gamma, c=0.2, v=1.1) == pytest.approx(num_tokens / seconds, rel=0.02)


def test_a_cheap_draft_beats_a_better_one_that_costs_too_much() -> None:
    costs = Costs({1: 1.0, 2: 1.0, 3: 1.0}, {"cheap": 0.1, "good": 0.9})
    best = choose_draft({"cheap": 0.7, "good": 0.9}, costs)
    assert best is not None
    assert str(best.spec) == "cheap"


def test_a_dear_verification_shortens_the_round() -> None:
    flat = Costs(dict.fromkeys(range(1, 9), 1.0), {"S": 0.1})
    steep = Costs({m: 0.5 + 0.5 * m for m in range(1, 9)}, {"S": 0.1})
    longer, shorter = choose_draft({"S": 0.9}, flat), choose_draft({"S": 0.9}, steep)
    assert longer is not None
    assert shorter is not None
    assert longer.gamma > shorter.gamma


def test_plain_decoding_wins_where_no_draft_pays() -> None:
    costs = Costs({1: 1.0, 2: 2.0}, {"S": 0.5})
    assert choose_draft({"S": 0.5}, costs) is None
    assert choose_draft({}, costs) is None
    forced = choose_draft({"S": 0.5}, costs, least=0.0)
    assert forced is not None
    assert forced.speed.predicted < 1


def test_greedy_acceptance_is_the_match_and_sampled_acceptance_alpha() -> None:
    members = [member("S", match=60.0, alpha=0.7), member("M"), member("XL", "full", alpha=1.0)]
    assert known_acceptance(members, SamplingParams()) == {"S": 0.6}
    assert known_acceptance(members, SamplingParams(temperature=1.0)) == {"S": 0.7}


def test_coupled_acceptance_is_what_it_guarantees() -> None:
    members = [member("S", match=60.0, alpha=0.7)]
    assert known_acceptance(members, SamplingParams(temperature=1.0), "coupled") == {"S": 0.7 / 1.3}
    assert known_acceptance(members, SamplingParams(), "coupled") == {"S": 0.6}, "greedy is never coupled"


@pytest.mark.parametrize("context", [4, 64, 256])
def test_a_model_is_timed_whatever_its_context(context: int) -> None:
    config = ElasticConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    costs = measure_costs(model, {"S": View(model, Granularity(ffn=(0.5,)))}, SamplingParams())
    assert list(costs.target) == list(range(1, min(MAX_GAMMA + 1, context) + 1))
    assert all(seconds > 0 for seconds in [*costs.target.values(), *costs.drafts.values()])


def test_timing_threads_leaves_their_number_alone(tiny_model: ElasticLM) -> None:
    assert best_num_threads(tiny_model, 2) in (1, 2)
    assert torch.get_num_threads() == 1
