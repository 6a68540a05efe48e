"""Weights in 8 or 4 bits: codes with one scale for each output, and a product with them that is exact.

Activations are scaled token by token, never over the whole input (torch's own `linear_dynamic` takes one
range for all rows): a token's result does not depend on its companions, as a target's must not.

I inputs, O outputs, S scales that are tried.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FOUR_BITS: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
BITS = {torch.int8: 8, FOUR_BITS: 4}
"""Bits of a weight's code in each dtype."""
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Fractions of the scale that spans all weights of an output, which are tried for 4 bits."""
TINY = 1e-30
EXACT_INPUTS = 1024
"""Inputs whose products of 8-bit codes add up to less than 2^24, so that fp32 holds every partial sum."""


def quantize(weight_OI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes [..., O, I], integers up to 2^(bits-1) - 1 and their negatives, and scales [..., O, 1].

    An output's largest weight has the largest code. With 4 bits a smaller scale may serve all its other
    weights better: of a few scales, each output has the one with the least squared error.

    >>> codes_OI, scales_O1 = quantize(torch.tensor([[-2.0, 1.0, 0.5]]), 8)
    >>> codes_OI, 127 * scales_O1
    (tensor([[-127.,   64.,   32.]]), tensor([[2.]]))
    """
    weight_OI, most = weight_OI.float(), (1 << (bits - 1)) - 1
    scale_O1 = (weight_OI.abs().amax(-1, keepdim=True) / most).clamp_min(TINY)
    if bits == 4:
        tried_SO1 = torch.stack([scale_O1 * fraction for fraction in CLIPPED])
        errors_SO1 = torch.stack(
            [
                (_codes(weight_OI, one_O1, most) * one_O1 - weight_OI).square().sum(-1, keepdim=True)
                for one_O1 in tried_SO1
            ]
        )
        scale_O1 = tried_SO1.gather(0, errors_SO1.argmin(0, keepdim=True))[0]
    return _codes(weight_OI, scale_O1, most), scale_O1


def _codes(weight_OI: Tensor, scale_O1: Tensor, most: int) -> Tensor:
    return (weight_OI / scale_O1).round().clamp_(-most, most)


def int8_product(weight_OI: Tensor, bias_O: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return a product of 8-bit codes, summed exactly on every processor, from x [..., I] to fp32 [..., O].

    Libraries' integer products are not used: without VNNI they add pairs of products in 16 bits, where they
    overflow. Codes are multiplied as fp32 numbers instead, exact while every sum stays below 2^24.
    """
    codes_OI, scale_O1 = quantize(weight_OI, 8)
    parts = [part_OI.to(torch.int8) for part_OI in codes_OI.split(EXACT_INPUTS, dim=1)]
    scale_O = scale_O1[:, 0]
    bias_O = None if bias_O is None else bias_O.float()

    def apply(x: Tensor) -> Tensor:
        x = x.float()
        size_1 = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True).clamp_min_(TINY)
        codes = (x * (127 / size_1)).round_().split(EXACT_INPUTS, dim=-1)
        sums = [F.linear(given, part_OI.float()) for given, part_OI in zip(codes, parts, strict=True)]
        y: Tensor = sum(sums[1:], sums[0]) * (scale_O * (size_1 / 127))
        return y if bias_O is None else y + bias_O

    return apply
