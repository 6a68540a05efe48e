"""Budgets are read, or named with the remedy."""

import dataclasses

import pytest

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.rope_scaling import RopeScaling
from tests.models.checkpoint.test_gemma3 import GEMMA3
from train.search.budgets import cost_of, holds_unequal, parse_budget, parse_budgets


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("size=0.5", "'size' is not counted"),
        ("latency=12parsecs", "unknown unit 'parsecs'"),
        ("latency=12", "12 has no unit"),
        ("params=-1", "'-1' is no amount"),
        ("params=0", "'0' is no amount"),
        ("params=", "'' is no amount"),
        ("bytes=3k", "unknown unit 'k'"),
        ("params=101%", "101% is more than the full model"),
    ],
)
def test_what_is_no_budget_is_named(text: str, named: str) -> None:
    with pytest.raises(UsageError, match="--budget") as error:
        parse_budget(text)
    assert named in str(error.value)


def test_two_budgets_of_a_kind_exclude_each_other() -> None:
    with pytest.raises(UsageError, match=r"params=0\.5 and params=0\.3 exclude each other"):
        parse_budgets(["params=0.5", "bytes=0.5", "params=0.3"])


def test_a_fraction_is_of_what_the_full_model_costs(tiny_config: ElasticConfig) -> None:
    for kind in ("params", "bytes", "flops", "memory"):
        cost = cost_of(kind, tiny_config, weight_bytes=4, context=64)
        assert parse_budget(f"{kind}=0.5").limit(cost) == cost(FULL) / 2
        assert cost(Granularity(ffn=(0.5,))) < cost(FULL)


def test_engines_hold_what_their_sources_say(tiny_config: ElasticConfig) -> None:
    assert holds_unequal("hf", tiny_config) == (True, True)
    assert holds_unequal("sglang", tiny_config) == (True, False)
    assert holds_unequal("mlx", tiny_config) == (False, False)
    assert holds_unequal("llama.cpp", tiny_config) == (True, True)
    without_positions = dataclasses.replace(tiny_config, no_rope_layers=(1, 1, 1, 0))
    assert holds_unequal("llama.cpp", without_positions) == (False, False)
    stretched = RopeScaling(rope_type="linear", factor=2.0)
    qwen3 = dataclasses.replace(tiny_config, qk_norm=True, tie_word_embeddings=True)
    assert holds_unequal("llama.cpp", qwen3) == (True, True)
    assert holds_unequal("llama.cpp", dataclasses.replace(qwen3, rope_scaling=stretched)) == (False, False)
    gemma3 = dataclasses.replace(tiny_config, **GEMMA3)
    assert holds_unequal("hf", gemma3) == (True, False)
    with pytest.raises(UsageError, match="--for ollama"):
        holds_unequal("ollama", tiny_config)


def test_weights_that_are_stored_unequally_count_in_bytes_and_memory(tiny_config: ElasticConfig) -> None:
    equal, stored = (
        {
            kind: cost_of(kind, tiny_config, weight_bytes=4, context=64, stored=bytes_of)(FULL)
            for kind in ("bytes", "memory", "params")
        }
        for bytes_of in (None, lambda _: 100.0)
    )
    assert stored["bytes"] == 100
    assert equal["memory"] - stored["memory"] == equal["bytes"] - 100
    assert stored["params"] == equal["params"]
