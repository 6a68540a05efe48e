"""Products of 8-bit codes are the plain ones but for their rounding, and treat each token alone."""

import pytest
import torch

from models.kernels.codes import int8_product

TOLERANCE = 2e-2
"""Largest error relative to the largest value: weights and activations have 8 bits."""


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_an_int8_product_is_the_product(bias: bool) -> None:
    torch.manual_seed(0)
    weight_OI, x_BTI = torch.randn(48, 64), torch.randn(2, 5, 64)
    bias_O = torch.randn(48) if bias else None
    y_BTO = int8_product(weight_OI, bias_O)(x_BTI)
    exact_BTO = x_BTI.double() @ weight_OI.double().T + (0.0 if bias_O is None else bias_O.double())
    assert y_BTO.shape == (2, 5, 48)
    assert (y_BTO - exact_BTO).abs().max() <= TOLERANCE * exact_BTO.abs().max()


def test_a_token_does_not_depend_on_its_companions() -> None:
    torch.manual_seed(0)
    product, x_BTI = int8_product(torch.randn(48, 64)), torch.randn(1, 6, 64)
    among_others_BTI = x_BTI.clone()
    among_others_BTI[:, 1:] *= 1e3
    assert product(x_BTI)[:, 0].equal(product(among_others_BTI)[:, 0])
