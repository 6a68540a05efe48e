"""Matrix products for a few tokens: a weight is packed once and applied many times.

Decoding multiplies each weight with one token, or with the few that verification scores, so its speed is
that of reading weights. Every kernel here maps x [..., I] to [..., O] and may finish its result in the
same pass, where it still lies in a register:

    linear    the weight in oneDNN's own layout, which a product on few rows reads at up to twice the speed
              of a plain one; a plain one where oneDNN has no kernel for the dtype
    int8      8-bit weights, one scale a row, and 8-bit activations, one scale a token

Activations are scaled token by token, never over the whole input (torch's own `linear_dynamic` takes one
range for all rows): a token's result does not depend on its companions, as a target's must not.

I inputs, O outputs.
"""

from typing import Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Finish: TypeAlias = Literal["none", "silu", "mul", "add"]
"""What happens to a product at the end: nothing, SiLU, times or plus another tensor."""

NUM_ROWS = 8
"""Rows that a layout is made for: between one token and a verified block. It runs with any number."""
FOUR_BITS: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
BITS = {torch.int8: 8, FOUR_BITS: 4}
"""Of the codes that weights become."""
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the scale that spans all weights of an output, which are tried for 4 bits."""
TINY = 1e-30
EXACT_INPUTS = 1024
"""Inputs whose products of 8-bit codes add up to less than 2^24, so that fp32 holds every partial sum."""
_ONEDNN_FINISH = {"silu": "swish"}


class Kernel(Protocol):
    """A matrix product with a packed weight."""

    def __call__(self, x: Tensor, finish: Finish = "none", other: Tensor | None = None) -> Tensor:
        """Map x [..., I] to [..., O]; `other`, of that shape, is what "mul" and "add" take."""
        ...


def finished(y: Tensor, finish: Finish, other: Tensor | None) -> Tensor:
    """The end of a product, on its own.

    >>> finished(torch.tensor([2.0]), "mul", torch.tensor([3.0]))
    tensor([6.])
    """
    if finish == "silu":
        return F.silu(y)
    if other is not None:
        return other * y if finish == "mul" else other + y
    return y


def linear_kernel(weight_OI: Tensor, bias_O: Tensor | None = None) -> Kernel:
    """A product in the dtype of the weight."""
    if _onednn_packs(weight_OI):
        return _onednn_kernel(weight_OI, bias_O)
    weight_OI = weight_OI.contiguous()

    def apply(x: Tensor, finish: Finish = "none", other: Tensor | None = None) -> Tensor:
        return finished(F.linear(x, weight_OI, bias_O), finish, other)

    return apply


def quantized(weight_OI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes [..., O, I], whole numbers from 1 - 2^(bits-1) to 2^(bits-1) - 1, and their scales [..., O, 1].

    An output's largest weight has the largest code. With 4 bits a smaller scale may do better by all others:
    of a few, each output has the one with the least squared error.

    >>> codes_OI, scales_O1 = quantized(torch.tensor([[-2.0, 1.0, 0.5]]), 8)
    >>> codes_OI, 127 * scales_O1
    (tensor([[-127.,   64.,   32.]]), tensor([[2.]]))
    """
    weight_OI, most = weight_OI.float(), (1 << (bits - 1)) - 1
    scale_O1 = (weight_OI.abs().amax(-1, keepdim=True) / most).clamp_min(TINY)
    if bits == 4:
        tried_SO1 = torch.stack([scale_O1 * share for share in CLIPPED])
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


def int8_kernel(weight_OI: Tensor, bias_O: Tensor | None = None) -> Kernel:
    """A product of 8-bit codes, summed exactly on every processor; the result is in fp32.

    Libraries' integer products are not used: without VNNI they add pairs of products in 16 bits, where they
    overflow. Codes are multiplied as fp32 numbers instead, exact while every sum stays below 2^24.
    """
    codes_OI, scale_O1 = quantized(weight_OI, 8)
    parts = [part_OI.to(torch.int8) for part_OI in codes_OI.split(EXACT_INPUTS, dim=1)]
    scale_O = scale_O1[:, 0]
    bias_O = None if bias_O is None else bias_O.float()

    def apply(x: Tensor, finish: Finish = "none", other: Tensor | None = None) -> Tensor:
        x = x.float()
        size_1 = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True).clamp_min_(TINY)
        codes = (x * (127 / size_1)).round_().split(EXACT_INPUTS, dim=-1)
        sums = [F.linear(given, part_OI.float()) for given, part_OI in zip(codes, parts, strict=True)]
        y = sum(sums[1:], sums[0]) * (scale_O * (size_1 / 127))
        return finished(y if bias_O is None else y + bias_O, finish, other)

    return apply


def _onednn_packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _onednn_kernel(weight_OI: Tensor, bias_O: Tensor | None) -> Kernel:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), NUM_ROWS)
    alone = torch.ops.mkldnn._linear_pointwise.default
    with_other = torch.ops.mkldnn._linear_pointwise.binary

    def apply(x: Tensor, finish: Finish = "none", other: Tensor | None = None) -> Tensor:
        if other is None:
            y = alone(x, packed, bias_O, _ONEDNN_FINISH.get(finish, finish), [], "")
        else:
            y = with_other(x, other, packed, bias_O, finish)
        return cast(Tensor, y)

    return apply
