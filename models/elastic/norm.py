"""RMSNorm, alone or at the head of a residual branch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.elastic import ops
from models.elastic.config import ElasticConfig


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (https://arxiv.org/abs/1910.07467).

    Args:
        size: numbers of that dimension.
        config: the model's shape, which says epsilon and how gains are stored.
    """

    def __init__(self, size: int, config: ElasticConfig) -> None:
        super().__init__()
        self.eps, self.has_offset = config.rms_norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.zeros(size) if self.has_offset else torch.ones(size))

    @property
    def gain(self) -> Tensor:
        """What normalised numbers are multiplied by; in fp32 where it is not what is stored."""
        return self.weight.to(ops.at_least_fp32(self.weight.dtype)) + 1 if self.has_offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; see `ops.rms_norm`."""
        return ops.rms_norm(x, self.gain, self.eps, wide=self.has_offset)

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `x + branch(self(x))`: a pre-norm residual branch."""
        return ops.pre_norm_residual(x, self.gain, self.eps, branch, wide=self.has_offset)
