"""What members own: nothing for the full model, itself for a member, and all of it runs."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from models.checkpoint.layout import PADDED, lay_out
from models.checkpoint.weights import model_from
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.owned import NOTHING
from models.elastic.ownership import Ownership
from models.elastic.owning import copy_owned, own, owned_weights
from models.elastic.request import Request
from models.elastic.view import View
from models.kernels.build import library
from models.packed import decode_step
from models.packed.quantize import pack, prepare
from tests.models.checkpoint.test_gemma3 import GEMMA3

FAMILY = {
    "S": Granularity.parse("ffn=0.25"),
    "N": Granularity.parse("ffn=0.5,heads=0.5,layers=0:3"),
    "Mix": Granularity.parse("ffn=1:0.5:0.25:1"),
    "D": Granularity.parse("layers=0-1"),
    "XL": FULL,
}
NORMS, BOTH = Ownership(norms=True), Ownership(norms=True, rank=2, alpha=4.0)
TOKENS = torch.arange(20)[None]
SUM_ORDER = 2e-5
"""fp32 logits of order 1 through other kernels: sums in another order."""


def owning(model: ElasticLM, ownership: Ownership = BOTH) -> ElasticLM:
    """Members whose own weights are far from the full model's, the same each time."""
    own(model, {}, ownership)  # what members own already would stay, and grow with each example
    own(model, FAMILY, ownership, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for one in model.members:
        for name, parameter in one.named_parameters():
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            assert "norm" in name or "lora" in name
    return model


@pytest.fixture(params=["llama", "qwen2", "qwen3", "gemma3_text"])
def model(request: pytest.FixtureRequest, tiny_config: ElasticConfig) -> ElasticLM:
    kinds: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen2": {"attention_bias": True},
        "qwen3": {"qk_norm": True},
        "gemma3_text": GEMMA3,
    }
    made = ElasticLM(dataclasses.replace(tiny_config, **kinds[request.param]))
    made.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return made


def test_the_full_model_owns_nothing_and_stays_bit_for_bit(model: ElasticLM) -> None:
    """Invariant 2."""
    before_BTV = model(TOKENS)
    assert torch.equal(owning(model)(TOKENS), before_BTV)
    assert model.owned_by(FULL) is None
    assert {one.name for one in model.members} == {"S", "N", "Mix", "D"}


def test_a_member_starts_as_what_the_full_model_makes_of_it(model: ElasticLM) -> None:
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    before = {name: model(TOKENS, one) for name, one in FAMILY.items()}
    own(model, FAMILY, BOTH)
    for name, one in FAMILY.items():
        assert torch.equal(model(TOKENS, one), before[name]), name


@pytest.mark.parametrize("name", ["S", "N", "D"])
def test_a_member_equals_a_model_of_its_own_weights_with_what_it_owns(model: ElasticLM, name: str) -> None:
    before_BTV = model(TOKENS, FAMILY[name])
    view = View(owning(model), FAMILY[name])
    alone = ElasticLM(view.config)
    alone.load_state_dict(view.state_dict())
    torch.testing.assert_close(view(TOKENS), alone(TOKENS), atol=SUM_ORDER, rtol=0)
    assert not torch.allclose(view(TOKENS), before_BTV, atol=1e-2)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ffn=st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=3),
    heads=st.sampled_from([0.5, 1.0]),
    layers=st.sampled_from([(0, 1, 2), (0, 2, 3), (1, 2, 3)]),
)
def test_a_member_that_nobody_trained_is_the_same_in_place_cut_out_and_packed(
    tiny_model: ElasticLM, ffn: list[float], heads: float, layers: tuple[int, ...]
) -> None:
    granularity = Granularity(ffn=tuple(ffn), heads=(heads,), layers=layers)
    view = View(owning(tiny_model), granularity)
    theirs_TV = view(TOKENS)[0]
    layout = lay_out(view, PADDED)
    alone = model_from(layout.config, layout.tensors)
    torch.testing.assert_close(alone(TOKENS)[0], theirs_TV, atol=SUM_ORDER, rtol=0)
    packed = pack(tiny_model, "fp32", granularity)
    ours_TV = packed.run([Request(TOKENS[0].tolist(), packed.new_cache(32), 20)], granularity)
    torch.testing.assert_close(ours_TV, theirs_TV, atol=5 * SUM_ORDER, rtol=0)


def test_a_member_is_found_by_what_it_runs_not_by_its_name(tiny_model: ElasticLM) -> None:
    owning(tiny_model)
    spelled = Granularity(ffn=(0.25,), layers=(0, 1, 2, 3))
    assert torch.equal(tiny_model(TOKENS, spelled), tiny_model(TOKENS, FAMILY["S"]))
    assert tiny_model.owned_by(Granularity.parse("ffn=0.75")) is None


def test_an_exit_owns_its_final_norm_alone(tiny_model: ElasticLM) -> None:
    owning(tiny_model)
    exit_BTD, _ = tiny_model.states(TOKENS, exits=(2,))
    assert torch.equal(tiny_model.states(TOKENS, FAMILY["D"])[-1], exit_BTD)
    assert torch.equal(tiny_model.head(exit_BTD, FAMILY["D"]), tiny_model(TOKENS, FAMILY["D"]))
    assert [name for name, _ in owned_weights(tiny_model) if name.startswith("D")] == ["D.norm.weight"]


@pytest.mark.parametrize("ownership", [NORMS, BOTH, Ownership(rank=3)])
def test_shapes_are_those_of_the_weights(model: ElasticLM, ownership: Ownership) -> None:
    own(model, FAMILY, ownership)
    for one in model.members:
        found = {name: tuple(parameter.shape) for name, parameter in one.named_parameters()}
        assert found == ownership.shapes(model.config, one.granularity)


def test_gradients_reach_what_is_shared_and_what_is_owned(tiny_model: ElasticLM) -> None:
    owning(tiny_model)
    tiny_model(TOKENS, FAMILY["S"]).logsumexp(-1).sum().backward()
    for one in tiny_model.members:
        grads = [parameter.grad is not None for parameter in one.parameters()]
        assert all(grads) if one.name == "S" else not any(grads)
    gate = tiny_model.get_parameter("model.layers.0.mlp.gate_proj.weight")
    assert gate.grad is not None
    assert gate.grad[:16].any()
    assert not gate.grad[16:].any()


def test_a_copy_of_a_model_has_copies_of_what_its_members_own(tiny_model: ElasticLM) -> None:
    ours = owning(tiny_model)
    theirs = copy_owned(ours, ElasticLM(ours.config))
    for (name, our), (their_name, their) in zip(owned_weights(ours), owned_weights(theirs), strict=True):
        assert name == their_name
        assert torch.equal(our, their)
        assert our.data_ptr() != their.data_ptr()


@pytest.mark.parametrize("kernels", ["compiled", "torch"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["S", "N", "Mix", "D"])
def test_packed_members_run_with_what_they_own(
    model: ElasticLM, name: str, precision: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "torch":
        monkeypatch.setattr(decode_step, "library", lambda: None)
    packed = pack(owning(model), precision, FAMILY[name])
    with torch.inference_mode():
        rows_TV = packed.run([Request(list(range(12)), packed.new_cache(32), 12)], FAMILY[name])
        theirs_TV = model(TOKENS[:, :12], FAMILY[name])[0]
        assert float((rows_TV - theirs_TV).norm() / theirs_TV.norm()) < {"fp32": 1e-4, "int8": 0.2}[precision]
        full_TV = packed.run([Request(list(range(12)), packed.new_cache(32), 12)])
        assert torch.equal(
            full_TV, pack(model, precision).run([Request(list(range(12)), packed.new_cache(32), 12)])
        )


def test_gains_cost_no_packed_copy_and_additions_do(tiny_model: ElasticLM) -> None:
    if library("decode_step") is None:
        pytest.skip("needs a C compiler")
    found = []
    for ownership in (Ownership(), NORMS, BOTH):
        own(tiny_model, FAMILY, ownership)
        found.append(prepare(pack(tiny_model, "int8"), FAMILY["S"]))
    assert found[0] == found[1] == 0
    assert found[2] > 0


def test_a_member_that_was_not_trained_borrows_of_the_nearest_in_each_layer(tiny_model: ElasticLM) -> None:
    own(tiny_model, {"S": Granularity.parse("ffn=0.25"), "L": Granularity.parse("ffn=0.5")}, BOTH)
    small, large = tiny_model.members
    parts = tiny_model.parts(Granularity.parse("ffn=0.25:0.6:1:0.2"))
    assert parts is not None
    assert parts.layer(0) is small.layer(0), "the same width: additions, too"
    between = parts.layer(1)
    assert between.input_layernorm is large.layer(1).input_layernorm
    assert between.mlp.gate_proj is None
    assert parts.layer(2) is NOTHING, "the full model's own"
    assert parts.layer(3).input_layernorm is small.layer(3).input_layernorm
    assert parts.norm is large.norm
    assert tiny_model.parts(FULL) is None
    assert tiny_model.parts(Granularity.parse("layers=0-2")) is None, "its states are the full model's"
