"""A lower learning rate outside of what narrow members have."""

import copy

import pytest
import torch

from models.base.errors import NestlingError
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from train.recipe.recipe import load_recipe
from train.recipe.sections import OptimConfig
from train.run.optim import make_optimizer
from train.run.outer import inner_shapes, slow_outer

CONFIG = OptimConfig(lr=0.1, weight_decay=0.5)


def step(model: ElasticLM, texts: list[str], ratio: float) -> dict[str, torch.Tensor]:
    """Take two steps on random gradients, and return by how much each weight moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, CONFIG)
    slow_outer(optimizer, model, [Granularity.parse(text).resolve(model.config) for text in texts], ratio)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def test_what_no_narrow_member_has_takes_shorter_steps_and_all_else_the_same(tiny_model: ElasticLM) -> None:
    other = copy.deepcopy(tiny_model)
    texts = ["full", "layers=0", "ffn=0.25", "ffn=0.5,heads=0.5"]
    plain, slowed = step(tiny_model, texts, 1.0), step(other, texts, 0.25)
    plans = [Granularity.parse(text).resolve(tiny_model.config) for text in texts]
    inner = {f"model.{name}": shape for name, shape in inner_shapes(tiny_model, plans).items()}
    parts = {name.rpartition("proj")[0].rpartition(".")[2] for name in inner}
    # Heads: the first member has all of them, so they are nobody's alone.
    assert parts == {"gate_", "up_", "down_"}
    for name, whole in plain.items():
        expected = whole.clone()
        if name in inner:
            outer = torch.ones_like(whole, dtype=torch.bool)
            outer[tuple(slice(size) for size in inner[name])] = False
            assert outer.any(), name
            expected[outer] *= 0.25
        torch.testing.assert_close(slowed[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_heads_that_no_member_has_are_outer_too(tiny_model: ElasticLM) -> None:
    plans = [Granularity.parse("heads=0.5").resolve(tiny_model.config)]
    inner = inner_shapes(tiny_model, plans)
    rows = inner["layers.0.self_attn.q_proj.weight"]
    columns = inner["layers.0.self_attn.o_proj.weight"]
    assert rows[0] == columns[1] == tiny_model.config.hidden_size // 2
    assert "layers.0.mlp.gate_proj.weight" not in inner


@pytest.mark.parametrize("texts", [["full"], ["full", "layers=0"]])
def test_without_narrow_members_nothing_is_slowed(tiny_model: ElasticLM, texts: list[str]) -> None:
    other = copy.deepcopy(tiny_model)
    plain, slowed = step(tiny_model, texts, 1.0), step(other, texts, 0.5)
    assert all(torch.equal(plain[name], slowed[name]) for name in plain)


def test_inner_weights_are_bit_for_bit_what_they_were(tiny_model: ElasticLM) -> None:
    other = copy.deepcopy(tiny_model)
    plain, slowed = step(tiny_model, ["ffn=0.5"], 1.0), step(other, ["ffn=0.5"], 0.5)
    name = "model.layers.0.mlp.up_proj.weight"
    half = tiny_model.config.intermediate_size // 2
    assert torch.equal(plain[name][:half], slowed[name][:half])
    assert not torch.equal(plain[name][half:], slowed[name][half:])


def test_frozen_weights_stay(tiny_model: ElasticLM) -> None:
    for parameter in tiny_model.model.layers.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(tiny_model.state_dict())
    optimizer = make_optimizer(tiny_model, CONFIG)
    slow_outer(optimizer, tiny_model, [Granularity.parse("ffn=0.5").resolve(tiny_model.config)], 0.5)
    for parameter in tiny_model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, tensor in tiny_model.state_dict().items():
        if ".layers." in name:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "much"])
def test_a_ratio_is_above_0_and_at_most_1(value: str) -> None:
    with pytest.raises(NestlingError, match=rf"optim.outer_lr_ratio={value}: expected number in \(0, 1\]"):
        load_recipe(overrides=[f"optim.outer_lr_ratio={value}"])
