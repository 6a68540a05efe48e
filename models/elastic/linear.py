"""A linear map whose prefixes are linear maps of their own, and low-rank additions to a prefix."""

from typing import cast

import torch
from torch import Tensor, nn
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
        return torch.addmm(weight_OI, self.lora_B.weight, self.lora_A.weight, alpha=self.scale)


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
