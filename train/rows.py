"""Functions of logits, a few rows at a time.

A per-token loss over [N, V] logits written plainly walks over several [N, V] arrays and keeps most of
them for the backward pass. Rows do not depend on each other, so the value *and* the gradient of a few
rows can be made together, and only the gradient is kept. The same numbers for two thirds to a third
of the memory and, on a CPU with nothing else to do, in less time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ELEMENTS = 2**22
"""Logits of one piece on a CPU. A few such arrays are near the size of its last cache. Smaller pieces gain
little and start more parallel loops, each of which waits for the slowest thread: slow on a busy machine."""

GPU_ELEMENTS = 2**26
"""On a GPU pieces only bound memory, and should be large enough to keep it busy."""


def by_rows(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a row-wise function to tensors that share their first dimension, piece by piece.

    The gradient is computed together with the value, so there is no second derivative.

    Args:
        function: from the same rows of each tensor to one value per row; no row may see another.
        tensors: the first [N, V], which sets the size of a piece; the others [N, ...].

    Returns:
        value_N, differentiable with respect to every tensor that requires a gradient.

    >>> by_rows(lambda x_NV: x_NV.sum(-1), torch.ones(3, 2))
    tensor([2., 2., 2.])
    """
    num_rows, width = tensors[0].shape
    elements = CPU_ELEMENTS if tensors[0].device.type == "cpu" else GPU_ELEMENTS
    rows = max(1, elements // width)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        value_N: Tensor = _ByRows.apply(function, rows, *tensors)  # type: ignore[no-untyped-call]
        return value_N
    if num_rows <= rows:
        return function(*tensors)
    pieces = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    return torch.cat([function(*piece) for piece in pieces])


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[2:]
        grads = [torch.empty_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        values = []
        for start in range(0, max(len(tensors[0]), 1), rows):  # no rows are one empty piece
            piece = [x[start : start + rows].detach() for x in tensors]
            for x, need in zip(piece, needed, strict=True):
                x.requires_grad_(need)
            wanted = [x for x in piece if x.requires_grad]
            with torch.enable_grad():
                value_N = function(*piece)
                total = value_N.sum()  # a row's value is its own, so this has each row's own gradient
            found = iter(torch.autograd.grad(total, wanted))
            for grad in grads:
                if grad is not None:
                    grad[start : start + rows] = next(found)
            values.append(value_N.detach())
        ctx.save_for_backward(*grads)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if grad is None else grad * grad_N.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype)
            for grad in ctx.saved_tensors
        ]
        return None, None, *grads
