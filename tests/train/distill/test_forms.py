"""What a cache keeps of a teacher: bytes, what they stand for, and that draws are fair."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base.errors import UsageError
from train.distill.forms import Everything, Form, Samples, TopK, draw, largest, make_form
from train.objective.buckets import SAMPLED
from train.objective.losses import divergence
from train.recipe.recipe import load_recipe
from train.recipe.sections import LossConfig

V = 1000
STANDARD_ERRORS = 6.0
"""The mean of many draws is further off with probability 2e-9 (normal): all tests together, below 1e-6."""


def logits(num_rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(num_rows, V, generator=torch.Generator().manual_seed(seed))


def uniform(num: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(0).random(num)


def test_sixteen_tokens_take_less_than_a_hundred_bytes() -> None:
    assert TopK(k=16, vocab_size=49152).dtype.itemsize == 66
    assert Samples(k=16, vocab_size=49152).dtype.itemsize == 80
    assert TopK(k=16, vocab_size=151_936).dtype.itemsize == 98
    assert Samples(k=12, vocab_size=151_936).dtype.itemsize == 84


@pytest.mark.parametrize("size", [40, 1000, 1024, 5000])
def test_the_largest_are_those_of_topk(size: int) -> None:
    x_NV = torch.randn(7, size)
    values, ids = largest(x_NV, 4)
    assert torch.equal(values, x_NV.topk(4).values)
    assert torch.equal(ids, x_NV.topk(4).indices)


def test_draws_fall_where_the_cumulated_probabilities_pass_the_points() -> None:
    p_NV = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    points_NK = torch.tensor([[0.0, 0.2, 0.25, 0.74, 0.76, 0.999]], dtype=torch.float64)
    assert draw(p_NV, points_NK).tolist() == [[0, 0, 2, 2, 3, 3]]


def test_a_token_is_drawn_as_often_as_its_probability_says_and_at_most_one_more_or_less() -> None:
    form = Samples(k=16, vocab_size=V)
    p_NV = logits(50)
    records = form.encode(p_NV, uniform(50))
    counts_NV = np.zeros((50, V))
    for row in range(50):
        np.add.at(counts_NV[row], records["ids"][row].astype(int), records["counts"][row])
    assert (records["counts"].sum(-1) == 16).all()
    assert np.abs(counts_NV - 16 * p_NV.softmax(-1).numpy()).max() < 1


@pytest.mark.parametrize("name", sorted({*SAMPLED} - {"reverse_kl"}))
def test_the_mean_of_many_draws_is_the_dense_loss_and_its_gradient(name: str) -> None:
    """Of reverse KL, whose terms q / p log q / p have a long tail, tests/train/objective has the exact sum.

    False alarm: below 1e-6, see `STANDARD_ERRORS`.
    """
    num_draws = 4000
    config = LossConfig(divergence=name, beta=0.9)  # type: ignore[arg-type]
    teacher_V, student_V = logits(1), logits(1) + 0.5 * logits(1, seed=1)
    form = Samples(k=16, vocab_size=V)
    records = form.encode(teacher_V.expand(num_draws, -1), uniform(num_draws))
    student_NV = student_V.expand(num_draws, -1).clone().requires_grad_()
    drawn_N = form.divergence(records, student_NV, config)
    dense = student_V.clone().requires_grad_()
    exact = divergence(teacher_V, dense, config)
    exact.sum().backward()
    drawn_N.sum().backward()
    assert student_NV.grad is not None
    assert dense.grad is not None
    direction_V = torch.randn(V, generator=torch.Generator().manual_seed(2))
    for ours_N, theirs in (
        (drawn_N.detach(), exact.item()),
        (student_NV.grad @ direction_V, float(dense.grad @ direction_V)),
    ):
        error = float(ours_N.std()) / math.sqrt(num_draws)
        rounding = 3e-4 * abs(theirs) + 3e-4  # of the codes
        assert abs(float(ours_N.mean()) - theirs) < STANDARD_ERRORS * error + rounding


def test_the_mean_of_a_renormalised_top_k_is_not() -> None:
    """The same test finds the bias of what is not offered: it has teeth."""
    teacher_V = logits(1)
    top = teacher_V.topk(16)
    kept_V = torch.full_like(teacher_V, -torch.inf).scatter(1, top.indices, top.values)
    config = LossConfig(divergence="forward_kl")
    assert float(divergence(kept_V, teacher_V, config)) > 0.3, "at p = q, where the dense loss is 0"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_keeps_probabilities_to_a_4000th(temperature: float) -> None:
    form = TopK(k=16, vocab_size=V, temperature=temperature)
    p_NV = logits(20)
    records = form.encode(p_NV, uniform(20))
    exact_NV = (p_NV / temperature).softmax(-1)
    ids_NK = torch.from_numpy(records["ids"].astype(np.int64))
    ours_NB = np.exp(-records["logs"].astype(float) * 2.0**-11)
    exact_NK = exact_NV.gather(1, ids_NK)
    np.testing.assert_allclose(ours_NB[:, :-1], exact_NK, rtol=1 / 4000)
    np.testing.assert_allclose(ours_NB[:, -1], 1 - exact_NK.sum(-1), rtol=1e-3)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_everything_is_kept_bit_for_bit(weights: str) -> None:
    form: Form = Everything(vocab_size=V, weights=weights)
    p_NV = logits(3).to(torch.bfloat16 if weights == "bf16" else torch.float32)
    q_NV, config = logits(3, seed=1), LossConfig()
    ours_N = form.divergence(form.encode(p_NV, uniform(3)), q_NV, config)
    assert torch.equal(ours_N, divergence(p_NV, q_NV, config))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["distill.form=samples", "loss.divergence=neg_log_alpha"],
            "loss.divergence=neg_log_alpha is no expectation",
        ),
        (["distill.k=200"], "distill.k=200: the teacher has 100 tokens"),
    ],
)
def test_a_form_that_cannot_be_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make_form(load_recipe(overrides=words), 100, "fp32")
