"""Packed products equal the plain ones, whatever happens at their end, and treat each token alone."""

import pytest
import torch
from torch import Tensor

from models.base.dtypes import DTYPES
from models.kernels.torch_linear import Finish, Kernel, finished, int8_kernel, linear_kernel

# Largest error of a product, relative to the largest value: rounding of the dtype, of 8-bit codes.
TOLERANCES = {"fp32": 2e-6, "bf16": 8e-3, "fp16": 1e-3, "int8": 2e-2}
FINISHES: list[Finish] = ["none", "silu", "mul", "add"]


def make(precision: str, weight_OI: Tensor, bias_O: Tensor | None) -> Kernel:
    if precision == "int8":
        return int8_kernel(weight_OI, bias_O)
    dtype = DTYPES[precision]
    return linear_kernel(weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_kernel_is_the_product_and_its_finish(precision: str, finish: Finish, bias: bool) -> None:
    torch.manual_seed(0)
    dtype = DTYPES.get(precision, torch.float32)
    weight_OI, x_BTI = torch.randn(48, 64).to(dtype), torch.randn(2, 5, 64).to(dtype)
    bias_O = torch.randn(48).to(dtype) if bias else None
    other_BTO = torch.randn(2, 5, 48).to(dtype) if finish in ("mul", "add") else None
    y_BTO = make(precision, weight_OI, bias_O)(x_BTI, finish, other_BTO)
    exact = x_BTI.double() @ weight_OI.double().T + (0.0 if bias_O is None else bias_O.double())
    exact = finished(exact, finish, None if other_BTO is None else other_BTO.double())
    assert y_BTO.shape == (2, 5, 48)
    assert (y_BTO - exact).abs().max() <= TOLERANCES[precision] * exact.abs().max()


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_token_does_not_depend_on_its_companions(precision: str) -> None:
    torch.manual_seed(0)
    dtype = DTYPES.get(precision, torch.float32)
    kernel = make(precision, torch.randn(48, 64).to(dtype), None)
    x_BTI = torch.randn(1, 6, 64).to(dtype)
    among_others = x_BTI.clone()
    among_others[:, 1:] *= 1e3
    assert kernel(x_BTI)[:, 0].equal(kernel(among_others)[:, 0])


def test_a_weight_may_be_a_slice() -> None:
    wide_OI, x_TI = torch.randn(64, 96), torch.randn(3, 48)
    slice_OI = wide_OI[:40, :48]
    torch.testing.assert_close(linear_kernel(slice_OI)(x_TI), x_TI @ slice_OI.T, rtol=0, atol=2e-5)
