"""Gradients of each member, against a backward pass of its own and slices written by hand."""

import dataclasses

import pytest
import torch
from torch import Tensor

from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.objective.losses import cross_entropy
from train.recipe.sections import LossConfig
from train.run.callbacks.gradients import compare_gradients

MEMBERS = {"S": Granularity.parse("ffn=0.25"), "D": Granularity.parse("layers=0-1"), "XL": FULL}
TEXT_ONLY = LossConfig(divergence="cross_entropy", narrow_gradient=1.0, exit_gradient=1.0)


@pytest.fixture
def batch() -> Batch:
    rows_BT = torch.randint(0, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    labels_BT = rows_BT[:, 1:].clone()
    labels_BT[1, 4:] = -100
    num_valid = int((labels_BT >= 0).sum())
    return Batch(rows_BT[:, :-1], labels_BT, step=9, first_row=0, num_rows=3, num_valid=num_valid)


def own_gradient(model: ElasticLM, batch: Batch, granularity: Granularity) -> dict[str, Tensor]:
    model.zero_grad()
    logits_NV = model(batch.tokens_BT, granularity).flatten(0, 1)
    cross_entropy(logits_NV, batch.labels_BT.flatten()).sum().div(batch.num_valid).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def of_the_member(name: str, gradient: dict[str, Tensor]) -> Tensor:
    """The numbers at the weights that a member has, in one vector."""
    kept = []
    for weight, tensor in gradient.items():
        if name == "D" and any(f"layers.{layer}." in weight for layer in (2, 3)):
            continue
        if name == "S" and ("gate_proj" in weight or "up_proj" in weight):
            tensor = tensor[:16]
        if name == "S" and "down_proj" in weight:
            tensor = tensor[:, :16]
        kept.append(tensor.flatten())
    return torch.cat(kept)


def test_norms_and_cosines_are_those_of_a_backward_pass_of_each_member(
    tiny_model: ElasticLM, batch: Batch
) -> None:
    found = compare_gradients(tiny_model, MEMBERS, batch, TEXT_ONLY)
    full = own_gradient(tiny_model, batch, FULL)
    assert found.pop("gradient/XL/norm") == pytest.approx(float(of_the_member("XL", full).norm()), rel=1e-5)
    for name in ("S", "D"):
        ours = of_the_member(name, own_gradient(tiny_model, batch, MEMBERS[name]))
        cosine = torch.cosine_similarity(ours, of_the_member(name, full), dim=0)
        assert found.pop(f"gradient/{name}/norm") == pytest.approx(float(ours.norm()), rel=1e-5)
        assert found.pop(f"gradient/{name}/cosine") == pytest.approx(float(cosine), abs=1e-5)
        assert abs(cosine) < 0.99
    assert not found


def test_a_member_pulls_as_its_ramped_loss_does(tiny_model: ElasticLM, batch: Batch) -> None:
    """Halfway up the ramp, with a divergence that weighs nothing, half of the cross-entropy is left."""
    half = dataclasses.replace(TEXT_ONLY, divergence="forward_kl", weight=0.0, ramp_start=8, ramp_steps=2)
    ours = compare_gradients(tiny_model, MEMBERS, batch, half)
    theirs = compare_gradients(tiny_model, MEMBERS, batch, TEXT_ONLY)
    for name, factor in {"S": 0.5, "D": 0.5, "XL": 1.0}.items():
        expected = factor * theirs[f"gradient/{name}/norm"]
        assert ours[f"gradient/{name}/norm"] == pytest.approx(expected, rel=1e-5)
    assert ours["gradient/S/cosine"] == pytest.approx(theirs["gradient/S/cosine"], abs=1e-5)


def test_a_member_without_a_pull_has_no_direction(tiny_model: ElasticLM, batch: Batch) -> None:
    nothing = LossConfig(divergence="forward_kl", weight=0.0, ramp_start=0, ramp_steps=0)
    found = compare_gradients(tiny_model, MEMBERS, batch, nothing)
    assert found["gradient/S/norm"] == found["gradient/S/cosine"] == 0.0


def test_nothing_that_training_holds_is_touched(tiny_model: ElasticLM, batch: Batch) -> None:
    before = own_gradient(tiny_model, batch, FULL)
    random = torch.get_rng_state()
    compare_gradients(tiny_model, MEMBERS, batch, LossConfig(ramp_start=0, ramp_steps=20))
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[name])
