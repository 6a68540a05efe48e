import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.base.labels import IGNORE_INDEX
from models.elastic import ops
from train.objective.losses import DIVERGENCES, cross_entropy, divergence, hidden_loss, member_loss, ramp
from train.recipe.sections import LossConfig

CONFIG = LossConfig(divergence="forward_kl", weight=2.0, ramp_start=10, ramp_steps=10)
AT_ONCE = replace(CONFIG, ramp_start=0, ramp_steps=0)


@pytest.fixture
def member() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a member, labels with two that are ignored, logits of the full model."""
    labels = torch.randint(0, 12, (16,))
    labels[[2, 11]] = IGNORE_INDEX
    return torch.randn(16, 12).requires_grad_(), labels, torch.randn(16, 12)


def test_cross_entropy_is_minus_the_log_probability_of_the_label() -> None:
    logits, labels = torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = -logits.log_softmax(-1)[torch.arange(5), labels]
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_half_precision_logits_give_an_fp32_cross_entropy() -> None:
    logits, labels = torch.randn(5, 300).to(torch.bfloat16), torch.randint(0, 300, (5,))
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(logits.float(), labels))


def test_an_ignored_label_has_neither_loss_nor_gradient(member: Any) -> None:
    logits, labels, target = member
    for value in (cross_entropy(logits, labels), member_loss(logits, labels, target, CONFIG, 15)):
        (grad,) = torch.autograd.grad(value.sum(), logits)
        assert (value[labels == IGNORE_INDEX] == 0).all()
        assert (grad[labels == IGNORE_INDEX] == 0).all()
        assert (value[labels != IGNORE_INDEX] != 0).all()


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (99, 1.0)])
def test_a_member_goes_from_cross_entropy_to_the_divergence(member: Any, step: int, share: float) -> None:
    logits, labels, target = member
    ours = member_loss(logits, labels, target, CONFIG, step)
    theirs = (1 - share) * cross_entropy(logits, labels)
    theirs = theirs + share * 2.0 * DIVERGENCES["forward_kl"](target, logits)
    theirs = torch.where(labels == IGNORE_INDEX, 0.0, theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits)
    )


def test_a_ramp_of_no_steps_is_a_switch() -> None:
    config = replace(CONFIG, ramp_steps=0)
    assert [ramp(step, config) for step in (0, 9, 10, 11)] == [0.0, 0.0, 1.0, 1.0]


def test_the_full_model_learns_nothing_from_what_was_detached(member: Any) -> None:
    logits, labels, target = member
    teacher = target.requires_grad_()
    member_loss(logits, labels, teacher.detach(), AT_ONCE, 0).sum().backward()
    assert teacher.grad is None


def test_an_impossible_label_does_not_reach_a_finished_ramp(member: Any) -> None:
    """0 times an infinite cross-entropy would be nan."""
    logits, labels, target = member
    masked = logits.detach().clone()
    masked[torch.arange(16), labels.clamp_min(0)] = -math.inf
    masked.requires_grad_()
    loss = member_loss(masked, labels, target, AT_ONCE, 0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert masked.grad is not None
    assert masked.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_recipe_s_temperature_and_setting_reach_the_divergence(name: str) -> None:
    p, q = torch.randn(2, 6, 9).unbind()
    config = LossConfig(divergence=name, temperature=2.0, beta=0.2, skew=0.3, eta=1.0)  # type: ignore[arg-type]
    own = {"jensen_shannon": {"beta": 0.2}, "skew_kl": {"skew": 0.3}, "kl_tv": {"eta": 1.0}}
    expected = DIVERGENCES[name](p, q, 2.0, **own.get(name, {}))
    assert torch.equal(divergence(p, q, config), expected)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_the_gradient_is_the_same_under_any_accumulation(member: Any, name: str, parts: int) -> None:
    """Invariant 6: sums over tokens, divided once by the global number of valid tokens."""
    logits, labels, target = member
    config = replace(CONFIG, divergence=name)  # type: ignore[arg-type]
    num_valid = (labels != IGNORE_INDEX).sum()

    def accumulate(num_chunks: int) -> Tensor:
        logits.grad = None
        chunks = (x.chunk(num_chunks) for x in (logits, labels, target))
        for logits_NV, labels_N, target_NV in zip(*chunks, strict=True):
            loss = member_loss(logits_NV, labels_N, target_NV, config, 15)
            (loss.sum() / num_valid).backward()
        gradient: Tensor = logits.grad
        return gradient

    torch.testing.assert_close(accumulate(parts), accumulate(1), atol=1e-9, rtol=1e-6)


def test_a_member_can_learn_from_the_text_alone() -> None:
    """Cross-entropy as the divergence: the teacher and the ramp do not matter."""
    p, q = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, IGNORE_INDEX, 6, 1])
    config = LossConfig(divergence="cross_entropy", ramp_start=0, ramp_steps=0, weight=9.0)
    assert torch.equal(member_loss(q, labels, p, config, 10**6), cross_entropy(q, labels))


def test_a_fraction_of_the_text_stays_when_the_ramp_is_over() -> None:
    """Before the ramp it changes nothing; amid it the two parts still add up."""
    generator = torch.Generator().manual_seed(0)
    logits_NV, target_NV = torch.randn(2, 5, 8, generator=generator)
    labels_N = torch.randint(0, 8, (5,), generator=generator)
    config = LossConfig(divergence="forward_kl", text_weight=0.25, ramp_start=0, ramp_steps=2)
    text_N, apart_N = cross_entropy(logits_NV, labels_N), DIVERGENCES["forward_kl"](target_NV, logits_NV)
    for step, text, apart in ((0, 1.0, 0.0), (1, 0.625, 0.5), (2, 0.25, 1.0)):
        ours_N = member_loss(logits_NV, labels_N, target_NV, config, step)
        torch.testing.assert_close(ours_N, text * text_N + apart * apart_N)


def test_hidden_states_are_compared_by_direction_with_the_gradient_of_a_cosine() -> None:
    states_ND = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    target_ND = torch.randn(5, 8, dtype=torch.double)
    loss_N = hidden_loss(states_ND, target_ND)
    torch.testing.assert_close(loss_N, 1 - torch.cosine_similarity(states_ND, target_ND))
    torch.testing.assert_close(hidden_loss(states_ND, 7 * target_ND), loss_N)
    assert torch.autograd.gradcheck(lambda states: hidden_loss(states, target_ND), (states_ND,))
    assert hidden_loss(target_ND.bfloat16(), target_ND.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("compiled", [True, False])
def test_near_hidden_states_are_told_apart_under_autocast(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(ops, "compiled_dtype", lambda _: None)
    target_ND = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    states_ND = (target_ND + 0.03 * target_ND.roll(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss_N = hidden_loss(states_ND, target_ND)
    torch.testing.assert_close(loss_N, 1 - torch.cosine_similarity(states_ND, target_ND), rtol=0.01, atol=0)


def test_hidden_states_of_zeros_have_a_bounded_gradient() -> None:
    states_ND = torch.zeros(2, 4, requires_grad=True)
    (gradient_ND,) = torch.autograd.grad(hidden_loss(states_ND, torch.ones(2, 4)).sum(), states_ND)
    assert 0 < float(gradient_ND.abs().max()) < 1e4
