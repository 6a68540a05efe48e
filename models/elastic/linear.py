"""A linear map whose prefixes are linear maps of their own, and low-rank additions to a prefix."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class LowRank(nn.Module):
    """A member's own addition `B A` to its prefix of a matrix, in LoRA's convention (2106.09685).

    Args:
        rows: outputs of the prefix.
        columns: inputs of the prefix.
        rank: rows of A and columns of B.
        alpha: the addition is scaled by alpha / rank.
    """

    def __init__(self, rows: int, columns: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Linear(columns, rank, bias=False)
        self.lora_B = nn.Linear(rank, rows, bias=False)
        self.scale = alpha / rank

    def add_to(self, weight_OI: Tensor) -> Tensor:
        """Return the prefix with the addition merged into it."""
        merged_OI: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
            weight_OI, self.lora_B.weight, self.lora_A.weight, self.scale
        )
        return merged_OI


class _AddLowRank(torch.autograd.Function):
    """`weight + scale B A` in the weights' own dtype, which the product that reads it may narrow.

    Under autocast, torch would narrow all three first, and a narrow product of rank 8 takes twice as long.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(b_OR, a_RI)
        # Given a place for its result, a product heeds no autocast.
        return torch.addmm(weight_OI, b_OR, a_RI, alpha=scale, out=weight_OI.new_empty(weight_OI.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        b_OR, a_RI = ctx.saved_tensors
        return grad_OI, grad_OI.mm(a_RI.t()).mul_(ctx.scale), b_OR.t().mm(grad_OI).mul_(ctx.scale), None


class NestedLinear(nn.Linear):
    """A linear map whose prefixes are slices of its weight.

    A slice is a view: nothing is copied, and at full size the weight itself is used, so that
    nesting costs the full model nothing.
    """

    def forward(self, x: Tensor, rows: int | None = None, addition: LowRank | None = None) -> Tensor:
        """Map x [..., I], I a prefix of the inputs, to the first `rows` outputs, or all if None."""
        return F.linear(x, *self.prefix(rows, x.shape[-1], addition))

    def prefix(
        self, rows: int | None, columns: int, addition: LowRank | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return weight [:rows, :columns], with what a member adds to it, and bias [:rows]."""
        weight, bias = self.weight, cast("Tensor | None", self.bias)  # torch's stubs say it is always there
        if columns != weight.shape[1]:
            weight = weight[:, :columns]
        if rows is not None and rows != weight.shape[0]:
            weight, bias = weight[:rows], None if bias is None else bias[:rows]
        return weight if addition is None else addition.add_to(weight), bias
