"""A linear map whose prefixes are linear maps of their own."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class NestedLinear(nn.Linear):
    """A linear map whose prefixes are slices of its weight.

    A slice is a view: nothing is copied, and at full size the weight itself is used, so that
    nesting costs the full model nothing.
    """

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Map x [..., I], I a prefix of the inputs, to the first `rows` outputs, or all if None."""
        return F.linear(x, *self.prefix(rows, x.shape[-1]))

    def prefix(self, rows: int | None, columns: int) -> tuple[Tensor, Tensor | None]:
        """Return weight [:rows, :columns] and bias [:rows]."""
        weight, bias = self.weight, cast("Tensor | None", self.bias)  # torch's stubs say it is always there
        if columns != weight.shape[1]:
            weight = weight[:, :columns]
        if rows is not None and rows != weight.shape[0]:
            return weight[:rows], None if bias is None else bias[:rows]
        return weight, bias
