"""Divergences from a teacher of whom only some probabilities are known."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from train.objective.buckets import SAMPLED, bucket_divergence, bucket_log_probs, sampled_divergence
from train.objective.divergences import DIVERGENCES
from train.objective.losses import divergence
from train.recipe.sections import LossConfig

N, V, K = 6, 40, 5


@pytest.fixture
def both() -> tuple[Tensor, Tensor]:
    """Logits of a teacher and of a student, in double."""
    p_NV, q_NV = 2 * torch.randn(2, N, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return p_NV, q_NV


def named(p_NV: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the k most likely tokens and of all others, and the tokens."""
    found = p_NV.log_softmax(-1).topk(k)
    rest_N1 = torch.log1p(-found.values.exp().sum(-1, keepdim=True))
    return torch.cat([found.values, rest_N1], -1), found.indices


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_buckets_are_sums_of_probabilities(both: tuple[Tensor, Tensor], temperature: float) -> None:
    ids_NK = torch.randperm(V)[:K].expand(N, K)
    p_NV = (both[0] / temperature).softmax(-1)
    ours_NB = bucket_log_probs(both[0], ids_NK, temperature).exp()
    torch.testing.assert_close(ours_NB[:, :-1], p_NV.gather(1, ids_NK))
    torch.testing.assert_close(ours_NB.sum(-1), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_those_of_plain_operations(
    both: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    ids_NK = named(both[0])[1]
    weights_NB = torch.randn(N, K + 1, dtype=torch.float64)
    ours = both[1].to(dtype).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    (bucket_log_probs(ours, ids_NK) * weights_NB).sum().backward()
    p_NV = theirs.softmax(-1)
    named_NK = p_NV.gather(1, ids_NK)
    plain_NB = torch.cat([named_NK, 1 - named_NK.sum(-1, keepdim=True)], -1).log()
    (plain_NB * weights_NB).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    largest = float(theirs.grad.abs().max())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("name", sorted({*DIVERGENCES} - {"total_variation", "neg_log_alpha", "kl_tv"}))
def test_gradients_of_buckets_are_the_derivatives(both: tuple[Tensor, Tensor], name: str) -> None:
    """Those with a kink have none at it, which a difference quotient may step over."""
    log_p_NB, ids_NK = named(both[0])
    config = LossConfig(divergence=name)  # type: ignore[arg-type]

    def loss(logits_NV: Tensor) -> Tensor:
        return bucket_divergence(log_p_NB, ids_NK, logits_NV, config, 1.3)

    assert torch.autograd.gradcheck(loss, (both[1].requires_grad_(),))


@pytest.mark.parametrize("name", sorted({*SAMPLED} - {"total_variation"}))
def test_gradients_of_samples_are_the_derivatives(both: tuple[Tensor, Tensor], name: str) -> None:
    log_p_NB, ids_NK = named(both[0])
    config = LossConfig(divergence=name)  # type: ignore[arg-type]
    weights_NK = torch.rand(N, K, dtype=torch.float64)

    def loss(logits_NV: Tensor) -> Tensor:
        return sampled_divergence(log_p_NB[:, :-1], weights_NK, ids_NK, logits_NV, config, 1.0)

    assert torch.autograd.gradcheck(loss, (both[1].requires_grad_(),))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_buckets_are_never_further_apart_than_all_tokens(both: tuple[Tensor, Tensor], name: str) -> None:
    """And nearer and nearer as they grow fewer; at p = q they are not apart."""
    config = LossConfig(divergence=name)  # type: ignore[arg-type]
    values = [bucket_divergence(*named(both[0], k), both[1], config, 1.0) for k in (2, 10, V - 1)]
    dense_N = divergence(both[0], both[1], config)
    if name != "kl_tv":  # its weight depends on alpha
        for less_N, more_N in zip(values, [*values[1:], dense_N], strict=True):
            assert (less_N <= more_N + 1e-9).all()
    torch.testing.assert_close(values[-1], dense_N)  # the last bucket is one token
    same_N = bucket_divergence(*named(both[0]), both[0], config, 1.0)
    torch.testing.assert_close(same_N, torch.zeros_like(same_N), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(SAMPLED))
def test_the_terms_of_samples_weighted_by_the_teacher_are_the_dense_divergence(
    both: tuple[Tensor, Tensor], name: str
) -> None:
    """Exactly: the expectation over a draw is this sum over all tokens; its gradient likewise."""
    p_NV, q_NV = both
    config = dataclasses.replace(LossConfig(divergence=name))  # type: ignore[arg-type]
    every_NV = torch.arange(V).expand(N, V)
    ours, theirs = q_NV.clone().requires_grad_(), q_NV.clone().requires_grad_()
    log_p_NV = p_NV.log_softmax(-1)
    ours_N = sampled_divergence(log_p_NV, log_p_NV.exp(), every_NV, ours, config, 1.0)
    dense_N = divergence(p_NV, theirs, config)
    torch.testing.assert_close(ours_N, dense_N)
    ours_N.sum().backward()
    dense_N.sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-6)


def test_the_renormalised_top_k_is_least_at_another_student() -> None:
    """Why it is not offered: the teacher itself is not its optimum."""
    p_V = torch.tensor([0.4, 0.3, 0.2, 0.1])
    kept_V = torch.tensor([0.4, 0.3, 0.0, 0.0]) / 0.7
    at_teacher = float((kept_V * (kept_V / p_V).log()).nan_to_num().sum())
    assert at_teacher == pytest.approx(-math.log(0.7)), "a loss of what is cut off, where none is due"
