"""The parts of a block that are not attention: RMSNorm, rotary positions, nested linear maps, SwiGLU.

D model, F ffn, K head dim, T positions.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.config import ElasticConfig
from models.elastic.rope import rope_frequencies
from models.kernels.calls import training_dtype
from models.kernels.torch_linear import Finish, finished
from models.kernels.train_ops import rms_norm, swiglu


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in the precision of the input, trained under autocast in that of the products behind it.

        Statistics are in fp32.
        """
        return self.beside(x)[0]

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and x, for who needs both: training then adds their gradients in one go."""
        dtype = training_dtype(x)
        if dtype is not None:
            return rms_norm(x, self.weight, self.eps, dtype)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps), x


class NestedMap(Protocol):
    """A linear map every prefix of which is a map of its own."""

    def prefix(
        self, x: Tensor, *, rows: int, columns: int, finish: Finish = "none", other: Tensor | None = None
    ) -> Tensor:
        """Apply the prefix `weight[:rows, :columns]`, and `finish` the result (kernels/torch_linear.py)."""
        ...

    def beside(self, others: "Sequence[NestedMap]", x: Tensor, *, rows: Sequence[int]) -> Tensor:
        """The results of several maps of the same input [..., I] side by side; this one is the first."""
        ...


class NestedLinear(nn.Linear):
    """A linear map whose prefixes are slices of its weight.

    A slice is a view: nothing is copied, and at full size the weight itself is used, so that
    nesting costs the full model nothing.
    """

    def prefix(
        self, x: Tensor, *, rows: int, columns: int, finish: Finish = "none", other: Tensor | None = None
    ) -> Tensor:
        """See `NestedMap`."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if columns != weight.shape[1]:
            weight = weight[:, :columns]
        if rows != weight.shape[0]:
            weight = weight[:rows]
            bias = None if bias is None else bias[:rows]
        return finished(F.linear(x, weight, bias), finish, other)

    def beside(self, others: Sequence[NestedMap], x: Tensor, *, rows: Sequence[int]) -> Tensor:
        """See `NestedMap`."""
        if training_dtype(x) is None:
            maps = zip((self, *others), rows, strict=True)
            return torch.cat([one.prefix(x, rows=count, columns=x.shape[-1]) for one, count in maps], -1)
        # One large product takes less time than several, and memory than their results beside each other.
        own = [self, *(cast(NestedLinear, other) for other in others)]
        weight_OI = torch.cat([one.weight[:count] for one, count in zip(own, rows, strict=True)])
        biases: list[Tensor | None] = [one.bias for one in own]  # torch's stubs say they are always there
        parts = [bias[:count] for bias, count in zip(biases, rows, strict=True) if bias is not None]
        return F.linear(x, weight_OI, torch.cat(parts) if parts else None)


class MLP(nn.Module):
    """SwiGLU feed-forward (https://arxiv.org/abs/2002.05202) over a prefix of its neurons."""

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        size, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj: NestedMap = NestedLinear(size, hidden, bias=False)
        self.up_proj: NestedMap = NestedLinear(size, hidden, bias=False)
        self.down_proj: NestedMap = NestedLinear(hidden, size, bias=False)

    def forward(self, x_BTD: Tensor, ffn: int, residual_BTD: Tensor) -> Tensor:
        """Add what the first `ffn` neurons make of x to the residual stream."""
        size = x_BTD.shape[-1]
        if training_dtype(x_BTD) is None:
            gate_BTF = self.gate_proj.prefix(x_BTD, rows=ffn, columns=size, finish="silu")
            y_BTF = self.up_proj.prefix(x_BTD, rows=ffn, columns=size, finish="mul", other=gate_BTF)
        else:
            gate_BTF = self.gate_proj.prefix(x_BTD, rows=ffn, columns=size)
            y_BTF = swiglu(gate_BTF, self.up_proj.prefix(x_BTD, rows=ffn, columns=size))
        return self.down_proj.prefix(y_BTF, rows=size, columns=ffn, finish="add", other=residual_BTD)


class Rotary(nn.Module):
    """Rotary position table (https://arxiv.org/abs/2104.09864), half-split layout as in Hugging Face."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
        angles_TK = torch.outer(positions, frequencies).repeat(1, 2)
        self.register_buffer("cos_TK", angles_TK.cos() * scale, persistent=False)
        sign_K = torch.full((config.head_dim,), scale)
        sign_K[: config.head_dim // 2] *= -1  # folds the minus of rotate_half into the table
        self.register_buffer("sin_TK", angles_TK.sin() * sign_K, persistent=False)

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [T, 1, K] of the positions, a range of them or one for each token."""
        cos_T1K, sin_T1K = self.cos_TK[positions].unsqueeze(1), self.sin_TK[positions].unsqueeze(1)
        return cos_T1K.to(dtype), sin_T1K.to(dtype)


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate each head's vector by its position's angles; linear, norm preserving.

    In the precision of the tables: autocast's narrower vectors are widened first, as sums of two precisions
    are slow.
    """
    x_BTHK = x_BTHK.to(cos_T1K.dtype)
    turned_BTHK = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BTHK * cos_T1K, turned_BTHK, sin_T1K)
