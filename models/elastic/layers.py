"""The parts of a block that are not attention or a norm: rotary positions, SwiGLU.

D model, F ffn, K head dim, T positions.
"""

import torch
from torch import Tensor, nn

from models.elastic import ops
from models.elastic.config import ElasticConfig
from models.elastic.linear import NestedLinear
from models.elastic.owned import OwnedMLP
from models.elastic.rope import rope_frequencies


class MLP(nn.Module):
    """SwiGLU feed-forward (https://arxiv.org/abs/2002.05202) over a prefix of its neurons."""

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        size, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = NestedLinear(size, hidden, bias=False)
        self.up_proj = NestedLinear(size, hidden, bias=False)
        self.down_proj = NestedLinear(hidden, size, bias=False)

    def forward(self, x_BTD: Tensor, ffn: int, owned: OwnedMLP) -> Tensor:
        """Return what the first `ffn` neurons make of x, with what a member adds to their weights."""
        gate_BTF = self.gate_proj(x_BTD, ffn, owned.gate_proj)
        y_BTF = ops.swiglu(gate_BTF, self.up_proj(x_BTD, ffn, owned.up_proj))
        y_BTD: Tensor = self.down_proj(y_BTF, None, owned.down_proj)
        return y_BTD


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
        """Return cosines and signed sines [T, 1, K] of a range of positions, or of one for each token."""
        cos_T1K, sin_T1K = self.cos_TK[positions].unsqueeze(1), self.sin_TK[positions].unsqueeze(1)
        return cos_T1K.to(dtype), sin_T1K.to(dtype)
