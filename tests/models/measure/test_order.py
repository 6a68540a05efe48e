"""Ordering leaves the full model alone and puts what matters first."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import Block, ElasticLM
from models.measure.importance import measure_importance
from models.measure.order import RULES, check_same, drop_layers, order_model
from tests.models.checkpoint.test_gemma3 import GEMMA3

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma3_text": GEMMA3,
    "untied": {"tie_word_embeddings": False},
}


def make_model(config: ElasticConfig, **changes: Any) -> ElasticLM:
    model = ElasticLM(dataclasses.replace(config, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def blocks(model: ElasticLM) -> list[Block]:
    return [cast(Block, block) for block in model.model.layers]


@pytest.fixture(name="tokens_BT")
def make_tokens() -> Tensor:
    return torch.randint(64, (4, 48), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_order_keeps_what_the_full_model_computes(
    tiny_config: ElasticConfig, tokens_BT: Tensor, shape: str, rule: str
) -> None:
    model = make_model(tiny_config, **SHAPES[shape])
    ordered = order_model(model, measure_importance(model, [tokens_BT]), rule)
    assert check_same(model, ordered, tokens_BT) < 1e-5
    half = Granularity.parse("ffn=0.5,heads=0.5")
    assert not torch.equal(ordered(tokens_BT, half), model(tokens_BT, half))


@torch.no_grad()
def test_neurons_that_do_nothing_come_last_and_a_prefix_without_them_is_the_full_model(
    tiny_config: ElasticConfig, tokens_BT: Tensor
) -> None:
    model = make_model(tiny_config)
    for block in blocks(model):
        block.mlp.down_proj.weight[:, ::2] = 0.0
    ordered = order_model(model, measure_importance(model, [tokens_BT]), "contribution")
    half = Granularity.parse("ffn=0.5")
    torch.testing.assert_close(ordered(tokens_BT, half), model(tokens_BT), atol=1e-4, rtol=0)
    assert not torch.allclose(model(tokens_BT, half), model(tokens_BT), atol=1e-2)


@torch.no_grad()
def test_a_group_whose_heads_do_nothing_comes_last(tiny_config: ElasticConfig, tokens_BT: Tensor) -> None:
    model = make_model(tiny_config)
    width = tiny_config.heads_per_group * tiny_config.head_dim
    for block in blocks(model):
        block.self_attn.o_proj.weight[:, :width] = 0.0
    ordered = order_model(model, measure_importance(model, [tokens_BT]))
    groups = tiny_config.num_key_value_heads
    most = Granularity.parse(f"heads={(groups - 1) / groups}")
    torch.testing.assert_close(ordered(tokens_BT, most), model(tokens_BT), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_layer_that_does_nothing_has_no_influence(tiny_config: ElasticConfig, tokens_BT: Tensor) -> None:
    model = make_model(tiny_config)
    idle = blocks(model)[1]
    idle.mlp.down_proj.weight.zero_()
    idle.self_attn.o_proj.weight.zero_()
    importance = measure_importance(model, [tokens_BT])
    assert float(importance.layers_L[1]) == pytest.approx(0.0, abs=1e-9)
    assert float(importance.layers_L[0]) > 1e-3
    batches = iter([tokens_BT[:2], tokens_BT[2:]])
    again = measure_importance(model, batches)  # how the text is cut does not matter
    torch.testing.assert_close(again.neurons_LF, importance.neurons_LF)


def test_layers_are_dropped_by_the_loss_without_them(tiny_config: ElasticConfig, tokens_BT: Tensor) -> None:
    importance = measure_importance(make_model(tiny_config), [tokens_BT])
    costs = {0: 5.0, 1: 0.5, 2: 1.0, 3: 0.2}
    layers = range(tiny_config.num_hidden_layers)

    def losses_of(choices: Sequence[tuple[int, ...]]) -> list[float]:
        return [sum(costs[layer] for layer in layers if layer not in kept) for kept in choices]

    steps = drop_layers(len(layers), importance, losses_of, 2)
    cheapest = sorted(layers, key=costs.__getitem__)
    assert [set(layers) - set(kept) for kept in steps] == [set(cheapest[:1]), set(cheapest[:2])]


def test_a_changed_model_and_no_text_are_told(tiny_config: ElasticConfig, tokens_BT: Tensor) -> None:
    model, other = make_model(tiny_config), make_model(tiny_config, rope_theta=99.0)
    with pytest.raises(NestlingError, match="ordering changed"):
        check_same(model, other, tokens_BT)
    with pytest.raises(NestlingError, match="no token"):
        measure_importance(model, [])
