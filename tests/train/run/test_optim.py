import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.ownership import Ownership
from models.elastic.owning import own
from train.recipe.sections import OptimConfig
from train.run.optim import learning_rate_factor, make_optimizer, make_schedule

CONFIG = OptimConfig(lr=0.1, weight_decay=0.5)


def names(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in parameters]


def test_matrices_decay_and_nothing_else_does(tiny_model: ElasticLM) -> None:
    decaying, others = make_optimizer(tiny_model, CONFIG).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert all(name.endswith("_proj.weight") for name in names(tiny_model, decaying["params"]))
    assert all("norm" in name or "embed" in name for name in names(tiny_model, others["params"]))
    assert "model.embed_tokens.weight" in names(tiny_model, others["params"])


def test_every_parameter_is_in_one_group_a_tied_one_once(tiny_model: ElasticLM) -> None:
    groups = make_optimizer(tiny_model, CONFIG).param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in tiny_model.parameters())


def test_a_head_of_its_own_is_a_matrix(tiny_config: ElasticConfig) -> None:
    model = ElasticLM(replace(tiny_config, tie_word_embeddings=False))
    decaying, _ = make_optimizer(model, CONFIG).param_groups
    assert "lm_head.weight" in names(model, decaying["params"])


def test_the_order_is_the_model_s_so_that_a_saved_state_fits_again(tiny_model: ElasticLM) -> None:
    order = [name for name, _ in tiny_model.named_parameters()]
    for group in make_optimizer(tiny_model, CONFIG).param_groups:
        group_names = names(tiny_model, group["params"])
        assert group_names == [name for name in order if name in group_names]
    optimizer = make_optimizer(tiny_model, CONFIG)
    optimizer.load_state_dict(make_optimizer(copy.deepcopy(tiny_model), CONFIG).state_dict())


def test_frozen_parameters_are_left_out(tiny_model: ElasticLM) -> None:
    tiny_model.model.embed_tokens.weight.requires_grad_(False)
    _, others = make_optimizer(tiny_model, CONFIG).param_groups
    assert "model.embed_tokens.weight" not in names(tiny_model, others["params"])


def test_what_members_own_may_have_a_rate_of_its_own(tiny_model: ElasticLM) -> None:
    own(tiny_model, {"S": Granularity(ffn=(0.5,))}, Ownership(norms=True, rank=2))
    groups = make_optimizer(tiny_model, CONFIG, owned=replace(CONFIG, lr=0.8)).param_groups
    rates = {name: group["lr"] for group in groups for name in names(tiny_model, group["params"])}
    decays = {name: group["weight_decay"] for group in groups for name in names(tiny_model, group["params"])}
    assert rates == {
        name: 0.8 if name.startswith("owned.") else 0.1 for name, _ in tiny_model.named_parameters()
    }
    assert {decays[name] for name in rates if "lora" in name} == {0.5}
    assert {decays[name] for name in rates if "norm" in name} == {0.0}
    assert [group["lr"] for group in make_optimizer(tiny_model, CONFIG).param_groups] == [0.1, 0.1]


def test_what_members_own_may_keep_more_of_its_rate_to_the_end(tiny_model: ElasticLM) -> None:
    own(tiny_model, {"S": Granularity(ffn=(0.5,))}, Ownership(norms=True, rank=2))
    config = OptimConfig(lr=0.1, warmup_steps=2, min_lr_ratio=0.1)
    owned = replace(config, min_lr_ratio=0.5)  # the peak is the same, so it alone makes the groups
    optimizer = make_optimizer(tiny_model, config, owned=owned)
    make_schedule(optimizer, tiny_model, config, owned=owned, max_steps=10, first_step=10)
    rates = {name: g["lr"] for g in optimizer.param_groups for name in names(tiny_model, g["params"])}
    assert rates == {
        name: pytest.approx(0.05 if name.startswith("owned.") else 0.01)
        for name, _ in tiny_model.named_parameters()
    }


@pytest.mark.parametrize("fused", [True, False])
def test_without_a_gradient_only_matrices_shrink(tiny_model: ElasticLM, fused: bool) -> None:
    before = copy.deepcopy(tiny_model.state_dict())
    for parameter in tiny_model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(tiny_model, OptimConfig(lr=0.1, weight_decay=0.5, fused=fused)).step()
    for name, after in tiny_model.state_dict().items():
        factor = 0.95 if name.endswith("_proj.weight") else 1.0
        torch.testing.assert_close(after, before[name] * factor)


SCHEDULES = st.builds(OptimConfig, warmup_steps=st.integers(0, 50), min_lr_ratio=st.floats(0.0, 1.0))


@given(config=SCHEDULES, max_steps=st.integers(1, 200))
def test_the_learning_rate_rises_to_its_peak_then_falls_to_its_floor(
    config: OptimConfig, max_steps: int
) -> None:
    factors = [learning_rate_factor(step, config, max_steps) for step in range(max_steps + 60)]
    rising, falling = factors[: config.warmup_steps], factors[config.warmup_steps :]
    assert all(0 < factor <= 1 for factor in rising)
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == 1.0
    assert factors[-1] == pytest.approx(config.min_lr_ratio, abs=1e-12)


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    assert learning_rate_factor(0, OptimConfig(warmup_steps=0), 10) == 1.0


def test_a_warm_up_longer_than_the_run_is_not_hurried() -> None:
    config = OptimConfig(warmup_steps=100)
    assert learning_rate_factor(9, config, 10) == 0.1
