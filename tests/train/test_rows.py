from typing import Any

import pytest
import torch
from torch import Tensor

from train import rows
from train.rows import by_rows


def product(x_NV: Tensor, y_NV: Tensor, scale_N: Tensor) -> Tensor:
    return (x_NV.softmax(-1) * y_NV.square()).sum(-1) * scale_N


@pytest.fixture(params=[1, 3, 4, 64], ids=lambda rows: f"{rows} rows a piece")
def tensors(request: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Ten rows of width 5, in pieces of some rows."""
    monkeypatch.setattr(rows, "CPU_ELEMENTS", 5 * request.param)
    made = [torch.randn(10, 5), torch.randn(10, 5), torch.arange(10)]
    return [made[0].requires_grad_(), made[1].requires_grad_(), made[2]]


def test_values_and_gradients_are_those_of_the_plain_function(tensors: list[Tensor]) -> None:
    weights = torch.randn(10)
    ours, theirs = by_rows(product, *tensors), product(*tensors)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours @ weights, tensors[:2]),
        torch.autograd.grad(theirs @ weights, tensors[:2]),
    )


def test_only_what_requires_a_gradient_gets_one(tensors: list[Tensor]) -> None:
    x, y, scale = tensors
    by_rows(product, x.detach(), y, scale).sum().backward()
    assert x.grad is None
    assert y.grad is not None
    assert not by_rows(product, x.detach(), y.detach(), scale).requires_grad
    with torch.no_grad():
        assert not by_rows(product, x, y, scale).requires_grad


def test_without_a_gradient_the_values_are_the_same(tensors: list[Tensor]) -> None:
    with torch.no_grad():
        torch.testing.assert_close(by_rows(product, *tensors), product(*tensors))


def test_backward_can_run_twice(tensors: list[Tensor]) -> None:
    total = by_rows(product, *tensors).sum()
    first = torch.autograd.grad(total, tensors[:2], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, tensors[:2])))


def test_no_rows_give_no_values() -> None:
    x = torch.empty(0, 5, requires_grad=True)
    value = by_rows(lambda x_NV: x_NV.sum(-1), x)
    value.sum().backward()
    assert (value.shape, x.grad is not None) == ((0,), True)
    assert by_rows(lambda x_NV: x_NV.sum(-1), x.detach()).shape == (0,)
