"""A linear map whose prefixes are linear maps of their own, and low-rank additions to a prefix."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.elastic.compiled import compiled_dtype
from models.kernels.train_merge import Prefix, merge


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

    @property
    def parts(self) -> tuple[Tensor, Tensor, float]:
        """B [O, R], A [R, I], and the scale of their product."""
        return self.lora_B.weight, self.lora_A.weight, self.scale

    def add_to(self, weight_OI: Tensor) -> Tensor:
        """Return the prefix with the addition merged into it."""
        merged_OI: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
            weight_OI, *self.parts
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
        return F.linear(x, *stack((self,), (rows,), x, (addition,)))

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


def stack(
    maps: Sequence[NestedLinear], rows: Sequence[int | None], x: Tensor, additions: Sequence[LowRank | None]
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a product with x: those of several maps, the one below the other.

    Args:
        maps: maps of the same x.
        rows: the outputs of each, its first ones; None: all.
        x: [..., I], I a prefix of the inputs.
        additions: what a member adds to each.
    """
    dtype, columns = compiled_dtype(x), x.shape[-1]
    each = list(zip(maps, rows, additions, strict=True))
    prefixes = [one.prefix(count, columns) for one, count, _ in each]
    biases = [bias for _, bias in prefixes if bias is not None]
    # A prefix alone is a view, which only a product in another dtype copies.
    copies = any(
        addition is not None or (weight is not one.weight and weight.dtype != dtype)
        for (one, _, addition), (weight, _) in zip(each, prefixes, strict=True)
    )
    if dtype is not None and copies and all(one.weight.dtype == torch.float32 for one in maps):
        parts = [
            Prefix(one.weight, len(weight), *(() if addition is None else addition.parts))
            for (one, _, addition), (weight, _) in zip(each, prefixes, strict=True)
        ]
        merged = merge(parts, columns, dtype)
    else:
        weights = [one.prefix(count, columns, addition)[0] for one, count, addition in each]
        merged = weights[0] if len(weights) == 1 else torch.cat(weights)
    return merged, torch.cat(biases) if len(biases) > 1 else next(iter(biases), None)
