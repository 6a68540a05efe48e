"""Prefixes of matrices with a member's own low-rank additions, merged for its products: see train_merge.h.

O outputs, I inputs, R rank.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.calls import pointers, run
from models.kernels.pack import TYPES


class Prefix(NamedTuple):
    """A prefix of a matrix, in fp32, and what a member adds to it, `scale * b a`.

    Args:
        weight_OI: the whole matrix.
        rows: outputs of the prefix.
        b_OR: None without an addition.
        a_RI: its columns are the inputs of the prefix.
        scale: of the addition.
    """

    weight_OI: Tensor
    rows: int
    b_OR: Tensor | None = None
    a_RI: Tensor | None = None
    scale: float = 1.0


def merge(prefixes: Sequence[Prefix], columns: int, dtype: torch.dtype) -> Tensor:
    """Return prefixes [:rows, :columns] with their additions, one below the other, in `dtype`.

    The gradient of a matrix is 0 behind its prefix. It is made in one walk; autograd would make a copy of
    the prefix's gradient in fp32, zeros for the whole matrix, and copy the one into the other.
    """
    tensors = [x for one in prefixes for x in (one.weight_OI, one.b_OR, one.a_RI)]
    sizes = tuple((one.rows, one.scale) for one in prefixes)
    merged_OI: Tensor = _Merge.apply(columns, dtype, sizes, *tensors)  # type: ignore[no-untyped-call]
    return merged_OI


class _MergeCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "rank")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "all_rows", "all_columns")),
        ("scale", ctypes.c_float),
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "b", "a", "merged", "weight_grad", "b_grad", "a_grad")
        ),
    )


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns: int,
        dtype: torch.dtype,
        sizes: tuple[tuple[int, float], ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.columns, ctx.sizes = columns, sizes
        ctx.save_for_backward(*tensors)
        merged_OI = torch.empty(sum(rows for rows, _ in sizes), columns, dtype=dtype)
        for call, _ in _calls(ctx, merged_OI, tensors):
            run("nestling_merge", call)
        return merged_OI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        grad_OI, tensors = grad_OI.contiguous(), ctx.saved_tensors
        grads: list[Tensor | None] = []
        for call, (weight_OI, *addition) in _calls(ctx, grad_OI, tensors):
            wanted = ctx.needs_input_grad[3 + len(grads)]
            some = [torch.empty_like(weight_OI) if wanted else None]
            some += [None if x is None else torch.empty_like(x) for x in addition]
            call.weight_grad, call.b_grad, call.a_grad = pointers(*some)
            run("nestling_merge", call, backward=True)
            grads += some
        return None, None, None, *grads


def _calls(
    ctx: Any, merged_OI: Tensor, tensors: Sequence[Tensor | None]
) -> list[tuple[_MergeCall, Sequence[Any]]]:
    """Return the call of each prefix, and its tensors; `merged_OI` or its gradient is divided among them."""
    calls, first = [], 0
    for number, (rows, scale) in enumerate(ctx.sizes):
        own = tensors[3 * number : 3 * number + 3]
        weight_OI, b_OR, _ = own
        assert weight_OI is not None
        rank, place = 0 if b_OR is None else b_OR.shape[1], merged_OI[first:].data_ptr()
        shape = (TYPES[merged_OI.dtype], rank, rows, ctx.columns, *weight_OI.shape)
        calls.append((_MergeCall(*shape, scale, *pointers(*own), place), own))
        first += rows
    return calls
