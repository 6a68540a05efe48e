"""Weights as decode_step.c reads them: panels of 32 outputs, two vectors for each 1, 2, 4 or 8 inputs.

Panels keep the order of outputs and inputs, so a member's part of a map is a prefix of its panels, and of
each panel: one copy serves every member. A layer's heads have panels of their own, padded with zeros.

O outputs, I inputs, P panels, E entries, L outputs of a panel, H heads of K outputs.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.codes import BITS, FOUR_BITS, quantize

PANEL = 32
"""Outputs of a panel."""
INPUTS_PER_ENTRY = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4, FOUR_BITS: 8}
"""Inputs that an entry of a panel holds, in the dtypes that there are panels for."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, FOUR_BITS: 3}
"""The number by which decode_step.c knows a dtype."""


class Map(ctypes.Structure):
    """The C struct of a packed linear map."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("entries", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Panels:
    """The packed prefix of a linear map.

    Args:
        weight: [P, entries, 32, inputs of an entry]; 8-bit codes are 128 more than they mean, 4-bit ones 8
            more, and two to a byte: [P, entries, 32, 4], inputs 4 to 7 in the upper halves.
        bias_O: fp32, or None.
        scales_PO: [P, 32] in fp32, of codes; or None.
        rows: outputs that are packed, those of padding left out.
        columns: inputs that are packed.
    """

    weight: Tensor
    bias_O: Tensor | None
    scales_PO: Tensor | None
    rows: int
    columns: int
    dtype: torch.dtype
    """The dtype of the packed numbers."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed copy."""
        tensors = (self.weight, self.bias_O, self.scales_PO)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def as_map(self) -> Map:
        """Return the C struct; it is valid while this object lives."""
        bias, scales = (
            None if tensor is None else tensor.data_ptr() for tensor in (self.bias_O, self.scales_PO)
        )
        return Map(self.weight.data_ptr(), bias, scales, self.weight.shape[1], TYPES[self.dtype])


def make_panels(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int = 0,
) -> Panels:
    """Pack a map, or a prefix of it.

    Args:
        weight_OI: the weight, in any dtype.
        bias_O: its bias.
        dtype: dtype of the panels, one of `INPUTS_PER_ENTRY`; None is the weight's.
        head_dim: if given, each head of that many outputs begins a panel.

    >>> panels = make_panels(torch.ones(40, 3), dtype=torch.bfloat16)
    >>> panels.weight.shape, panels.weight[1, 1, :, 0].sum().item(), panels.weight[0, 1, 0].tolist()
    (torch.Size([2, 2, 32, 2]), 8.0, [1.0, 0.0])
    """
    rows, columns = weight_OI.shape
    dtype = dtype or weight_OI.dtype
    each = INPUTS_PER_ENTRY[dtype]
    weight_HKI = weight_OI.detach().unflatten(0, (-1, head_dim or rows))
    padding = (0, -columns % each, 0, -weight_HKI.shape[1] % PANEL)
    scales_PO = None
    if dtype in BITS:
        codes_HKI, scales_HK1 = quantize(weight_HKI, BITS[dtype])
        middle = 1 << (BITS[dtype] - 1)
        weight_HKI = F.pad(codes_HKI + middle, padding, value=middle).to(torch.uint8)
        scales_PO = F.pad(scales_HK1, (0, 0, *padding[2:])).reshape(-1, PANEL)
    else:
        weight_HKI = F.pad(weight_HKI.to(dtype), padding)
    weight_PLI = weight_HKI.reshape(-1, PANEL, weight_HKI.shape[-1])
    weight_PELI = weight_PLI.unflatten(2, (-1, each)).transpose(1, 2)
    if dtype == FOUR_BITS:
        lower, upper = weight_PELI.split(each // 2, -1)
        weight_PELI = lower | upper << 4
    return Panels(
        weight_PELI.contiguous(),
        None if bias_O is None else bias_O.detach().float().contiguous(),
        scales_PO,
        rows,
        columns,
        dtype,
    )
