"""Weights as decode_step.c reads them: panels of 32 outputs, two vectors for each 1, 2, 4 or 8 inputs.

Panels keep the order of outputs and inputs, so a member's part of a map is a prefix of its panels, and of
each panel: one copy serves every member. A layer's heads have panels of their own, padded with zeros.

Weights in blocks of 32 inputs (models/kernels/blocks.py) keep their codes and scales.

O outputs, I inputs, P panels, E entries, L outputs of a panel, H heads of K outputs, B blocks.
"""

import ctypes
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.blocks import BLOCK, BlockTensor
from models.kernels.build import library
from models.kernels.codes import BITS, FOUR_BITS, quantize

AT_ONCE = 2**22
"""Weights that are packed at once: what is made of them on the way is small beside a large model."""
PANEL = 32
"""Outputs of a panel."""
INPUTS_PER_ENTRY = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4, FOUR_BITS: 8}
"""Inputs that an entry of a panel holds, in the dtypes that there are panels for."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, FOUR_BITS: 3}
"""The number by which decode_step.c knows a dtype."""
_COMPILED = (torch.float32, torch.bfloat16, torch.int8)
BLOCK_TYPES = {"Q8_0": 4, "Q4_0": 5, "Q4_1": 6}
"""The number by which it knows weights in blocks."""


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
            more, and two to a byte: [P, entries, 32, 4], inputs 4 to 7 in the upper halves. In blocks it is
            [P, B, bytes]: see models/kernels/matmul_blocks.h.
        bias_O: fp32, or None.
        scales_PO: [P, 32] in fp32, of codes; or None.
        rows: outputs that are packed, those of padding left out.
        columns: inputs that are packed.
        type: the number by which decode_step.c knows what is packed.
    """

    weight: Tensor
    bias_O: Tensor | None
    scales_PO: Tensor | None
    rows: int
    columns: int
    type: int

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
        return Map(self.weight.data_ptr(), bias, scales, self.weight.shape[1], self.type)


def make_panels(
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int = 0,
) -> Panels:
    """Pack a map, or a prefix of it.

    Args:
        weight_OI: the weight, in any dtype or in blocks.
        bias_O: its bias.
        dtype: dtype of the panels, one of `INPUTS_PER_ENTRY`; None is the weight's, or its blocks.
        head_dim: if given, each head of that many outputs begins a panel.

    >>> panels = make_panels(torch.ones(40, 3), dtype=torch.bfloat16)
    >>> panels.weight.shape, panels.weight[1, 1, :, 0].sum().item(), panels.weight[0, 1, 0].tolist()
    (torch.Size([2, 2, 32, 2]), 8.0, [1.0, 0.0])
    """
    rows, columns = weight_OI.shape
    dtype_or_blocks = dtype if dtype is not None or isinstance(weight_OI, BlockTensor) else weight_OI.dtype
    compiled = _pack_compiled(weight_OI.detach(), dtype_or_blocks, head_dim)
    each = head_dim or PANEL
    count = rows if compiled is not None else max(1, AT_ONCE // (columns * each)) * each
    whole: list[Tensor] = []
    for first in range(0, rows, count):
        some = compiled or _pack_rows(weight_OI[first : first + count].detach(), dtype_or_blocks, head_dim)
        if count >= rows:
            whole = some
            break
        num_panels = -(-rows // each) * -(-each // PANEL)
        whole = whole or [part.new_empty(num_panels, *part.shape[1:]) for part in some]
        panel = first // each * -(-each // PANEL)
        for all_P, part_P in zip(whole, some, strict=True):
            all_P[panel : panel + len(part_P)] = part_P
    return Panels(
        whole[0],
        None if bias_O is None else bias_O.detach().float().contiguous(),
        whole[1] if len(whole) > 1 else None,
        rows,
        columns,
        BLOCK_TYPES[cast(BlockTensor, weight_OI).kind] if dtype_or_blocks is None else TYPES[dtype_or_blocks],
    )


class _Packing(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("source", "type", "rows", "columns", "stride", "head_rows")),
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


def _pack_compiled(weight_OI: Tensor, dtype: torch.dtype | None, head_dim: int) -> list[Tensor] | None:
    """Return what `_pack_rows` does, by compiled code; None where that has no part in it."""
    if dtype not in _COMPILED or isinstance(weight_OI, BlockTensor) or weight_OI.dtype not in _COMPILED[:2]:
        return None
    compiled = library() if weight_OI.device.type == "cpu" and weight_OI.stride(1) == 1 else None
    if compiled is None:
        return None
    rows, columns = weight_OI.shape
    each = INPUTS_PER_ENTRY[dtype]
    num_panels = rows // (head_dim or rows) * -(-(head_dim or rows) // PANEL)
    stored = torch.uint8 if dtype == torch.int8 else dtype
    panels = torch.empty(num_panels, -(-columns // each), PANEL, each, dtype=stored)
    scales_PO = torch.empty(num_panels, PANEL) if dtype == torch.int8 else None
    packing = _Packing(
        weight_OI.data_ptr(),
        TYPES[weight_OI.dtype],
        TYPES[dtype],
        rows,
        columns,
        weight_OI.stride(0),
        head_dim or rows,
        panels.data_ptr(),
        None if scales_PO is None else scales_PO.data_ptr(),
    )
    if compiled.nestling_pack(ctypes.byref(packing), torch.get_num_threads()):
        raise MemoryError("a weight was packed without memory for it")
    return [panels] if scales_PO is None else [panels, scales_PO]


def _pack_rows(weight_OI: Tensor, dtype: torch.dtype | None, head_dim: int) -> list[Tensor]:
    """Return panels of some rows, which are whole heads or panels; and of codes the scales [P, 32]."""
    if dtype is None:
        assert isinstance(weight_OI, BlockTensor), type(weight_OI)
        return [_blocks_in_panels(weight_OI, head_dim or len(weight_OI))]
    rows, columns = weight_OI.shape
    each = INPUTS_PER_ENTRY[dtype]
    weight_HKI = weight_OI.unflatten(0, (-1, head_dim or rows))
    padding = (0, -columns % each, 0, -weight_HKI.shape[1] % PANEL)
    scales: list[Tensor] = []
    if dtype in BITS:
        codes_HKI, scales_HK1 = quantize(weight_HKI, BITS[dtype])
        middle = 1 << (BITS[dtype] - 1)
        weight_HKI = F.pad(codes_HKI + middle, padding, value=middle).to(torch.uint8)
        scales = [F.pad(scales_HK1, (0, 0, *padding[2:])).reshape(-1, PANEL)]
    else:
        weight_HKI = F.pad(weight_HKI.to(dtype), padding)
    weight_PLI = weight_HKI.reshape(-1, PANEL, weight_HKI.shape[-1])
    weight_PELI = weight_PLI.unflatten(2, (-1, each)).transpose(1, 2)
    if dtype == FOUR_BITS:
        lower, upper = weight_PELI.split(each // 2, -1)
        weight_PELI = lower | upper << 4
    return [weight_PELI.contiguous(), *scales]


def _blocks_in_panels(weight: BlockTensor, head_dim: int) -> Tensor:
    """Return [P, B, bytes]: codes of four inputs of each output at a time, then what all are scaled by."""
    blocks_HKBY = weight.blocks_OBY.unflatten(0, (-1, head_dim))
    padded = F.pad(blocks_HKBY, (0, 0, 0, 0, 0, -head_dim % PANEL)).flatten(0, 1)
    blocks_PBLY = padded.unflatten(0, (-1, PANEL)).transpose(1, 2)
    codes = BLOCK if weight.kind == "Q8_0" else BLOCK // 2
    halves, codes_PBLY = blocks_PBLY.split([blocks_PBLY.shape[-1] - codes, codes], -1)
    if weight.kind == "Q8_0":
        codes_PBLY = codes_PBLY ^ 0x80
    fours = codes_PBLY.unflatten(-1, (-1, 4)).transpose(2, 3)
    pairs = halves.unflatten(-1, (-1, 2)).transpose(2, 3)
    return torch.cat([fours.flatten(2), pairs.flatten(2)], -1).contiguous()
