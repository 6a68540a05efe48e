"""Weights as step.c reads them: panels of 32 outputs, two vectors for each input, pair or four of them.

Panels keep the order of outputs and inputs, so a member's part of a map is a prefix of its panels, and of
each panel: one copy serves every member. A layer's heads have panels of their own, padded with zeros.

O outputs, I inputs, P panels.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 32
"""Outputs of a panel."""
TINY = 1e-30
INPUTS_PER_ENTRY = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
"""Inputs that an entry of a panel holds, in the dtypes that there are panels for."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""What step.c calls a dtype."""


class Map(ctypes.Structure):
    """A linear map, as step.c takes it."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("entries", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Panels:
    """The packed prefix of a linear map.

    Args:
        weight: [P, entries, 32, inputs of an entry]; 8-bit codes are 128 more than they mean.
        bias_O: fp32, or None.
        scales_PO: [P, 32] in fp32, of 8-bit codes; or None.
        rows: outputs that are packed, those of padding left out.
        columns: inputs that are packed.
    """

    weight: Tensor
    bias_O: Tensor | None
    scales_PO: Tensor | None
    rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """Of the copy."""
        tensors = (self.weight, self.bias_O, self.scales_PO)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def as_map(self) -> Map:
        """Where it lies; good as long as this object is."""
        bias, scales = (
            None if tensor is None else tensor.data_ptr() for tensor in (self.bias_O, self.scales_PO)
        )
        return Map(self.weight.data_ptr(), bias, scales, self.weight.shape[1])


def make_panels(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int = 0,
) -> Panels:
    """Pack a map, or a prefix of it.

    Args:
        weight_OI: in any dtype.
        bias_O: its bias.
        dtype: of the panels, one of `INPUTS_PER_ENTRY`; None is the weight's.
        head_dim: if given, every so many outputs begin a panel.

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
    if dtype == torch.int8:
        scales_HK1 = (weight_HKI.float().abs().amax(2, keepdim=True) / 127).clamp_min(TINY)
        codes_HKI = (weight_HKI / scales_HK1).round() + 128
        weight_HKI = F.pad(codes_HKI, padding, value=128).to(torch.uint8)
        scales_PO = F.pad(scales_HK1, (0, 0, *padding[2:])).reshape(-1, PANEL)
    else:
        weight_HKI = F.pad(weight_HKI.to(dtype), padding)
    weight_PLI = weight_HKI.reshape(-1, PANEL, weight_HKI.shape[-1])
    return Panels(
        weight_PLI.unflatten(2, (-1, each)).transpose(1, 2).contiguous(),
        None if bias_O is None else bias_O.detach().float().contiguous(),
        scales_PO,
        rows,
        columns,
    )
