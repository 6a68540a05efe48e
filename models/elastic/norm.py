"""RMSNorm, alone or at the head of a residual branch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.elastic import ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; see `ops.rms_norm`."""
        return ops.rms_norm(x, self.weight, self.eps)

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `x + branch(self(x))`: a pre-norm residual branch."""
        return ops.pre_norm_residual(x, self.weight, self.eps, branch)
