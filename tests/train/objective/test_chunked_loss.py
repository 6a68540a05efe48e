from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from train.objective.chunked_loss import sum_by_chunks

Losses = Callable[..., Tensor]


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(5, 3).requires_grad_()


@pytest.fixture
def losses(weight: Tensor) -> Losses:
    """Two terms of rows of states, labelled by their chunk, through a weight that both read."""

    def function(number: int, x_ND: Tensor, y_ND: Tensor) -> Tensor:
        x_NV, y_NV = x_ND @ weight.T, y_ND @ weight.T
        return torch.stack([x_NV.logsumexp(-1).sum() * (number + 1), y_NV.square().sum()])

    return function


@pytest.fixture
def states() -> list[Tensor]:
    return [torch.randn(10, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()]


def cut(states: list[Tensor]) -> list[list[Tensor]]:
    """Three chunks, in one of which the second tensor has no rows."""
    return [list(chunk) for chunk in zip(states[0].split([4, 4, 2]), states[1].split([3, 0, 1]), strict=True)]


def plainly(losses: Losses, states: list[Tensor]) -> Tensor:
    return torch.stack([losses(number, *chunk) for number, chunk in enumerate(cut(states))]).sum(0)


def test_values_and_gradients_are_those_of_the_plain_sum(
    losses: Losses, states: list[Tensor], weight: Tensor
) -> None:
    theirs = plainly(losses, states)
    total, terms = sum_by_chunks(losses, cut(states), [weight])
    torch.testing.assert_close(terms, theirs)
    torch.testing.assert_close(total, theirs.sum())
    torch.testing.assert_close(
        torch.autograd.grad(3 * total, [*states, weight]),
        torch.autograd.grad(3 * theirs.sum(), [*states, weight]),
    )


def test_the_terms_alone_teach_nothing(losses: Losses, states: list[Tensor], weight: Tensor) -> None:
    _, terms = sum_by_chunks(losses, cut(states), [weight])
    assert not terms.requires_grad


def test_only_what_requires_a_gradient_gets_one(losses: Losses, states: list[Tensor], weight: Tensor) -> None:
    weight.requires_grad_(False)
    total, _ = sum_by_chunks(losses, cut([states[0].detach(), states[1]]), [weight])
    total.backward()
    assert (weight.grad, states[0].grad) == (None, None)
    assert states[1].grad is not None
    total, _ = sum_by_chunks(losses, cut([x.detach() for x in states]), [weight])
    assert not total.requires_grad


def test_without_a_gradient_the_values_are_the_same(
    losses: Losses, states: list[Tensor], weight: Tensor
) -> None:
    with torch.no_grad():
        total, terms = sum_by_chunks(losses, cut(states), [weight])
    assert not total.requires_grad
    torch.testing.assert_close(terms, plainly(losses, states).detach())


def test_backward_can_run_twice(losses: Losses, states: list[Tensor], weight: Tensor) -> None:
    total, _ = sum_by_chunks(losses, cut(states), [weight])
    first = torch.autograd.grad(total, [*states, weight], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, [*states, weight])))


def test_no_more_than_one_chunk_is_alive(states: list[Tensor], weight: Tensor) -> None:
    """What a chunk's graph holds is freed before the next one starts."""
    alive: list[int] = []

    def function(number: int, x_ND: Tensor) -> Tensor:
        assert not alive
        x_NV = x_ND @ weight.T
        alive.append(number)
        x_NV.register_hook(lambda _: alive.remove(number))
        return x_NV.square().sum()[None]

    total, _ = sum_by_chunks(function, [[x] for x in states[0].split(2)], [weight])
    assert (alive, total.requires_grad) == ([], True)
