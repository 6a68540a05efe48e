"""The parts of a block that are not attention or a norm: rotary positions, SwiGLU or GeGLU.

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
    """SwiGLU or GeGLU feed-forward (https://arxiv.org/abs/2002.05202) over a prefix of its neurons."""

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        size, hidden = config.hidden_size, config.intermediate_size
        self.activate = ops.swiglu if config.hidden_act == "silu" else ops.geglu
        self.gate_proj = NestedLinear(size, hidden, bias=False)
        self.up_proj = NestedLinear(size, hidden, bias=False)
        self.down_proj = NestedLinear(hidden, size, bias=False)

    def forward(self, x_BTD: Tensor, ffn: int, owned: OwnedMLP) -> Tensor:
        """Return what the first `ffn` neurons make of x, with what a member adds to their weights."""
        gate_BTF = self.gate_proj(x_BTD, ffn, owned.gate_proj)
        y_BTF = self.activate(gate_BTF, self.up_proj(x_BTD, ffn, owned.up_proj))
        y_BTD: Tensor = self.down_proj(y_BTF, None, owned.down_proj)
        return y_BTD


FIRST_POSITIONS = 1024
"""Positions that a rotary table begins with; it grows as texts do, up to the longest context."""


class Rotary(nn.Module):
    """Rotary position table (https://arxiv.org/abs/2104.09864), half-split layout as in Hugging Face.

    Args:
        config: the model's shape.
        is_local: make the table of layers that read a window, which one of the others has as its `local`.
    """

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, config: ElasticConfig, *, is_local: bool = False) -> None:
        super().__init__()
        self._config = config
        self._theta = config.rope_local_base_freq if is_local else config.rope_theta
        self._scaling = None if is_local else config.rope_scaling
        has_local = config.layer_types is not None and not is_local
        self.local = Rotary(config, is_local=True) if has_local else None
        with torch.device("cpu"):  # also of a model without memory, where torch would import its compiler
            tables = self._make(FIRST_POSITIONS)
        for name, table_TK in zip(("cos_TK", "sin_TK"), tables, strict=True):
            self.register_buffer(name, table_TK, persistent=False)

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines [T, 1, K] of a range of positions, or of one for each token."""
        # Positions of each token are on the CPU, so that their maximum waits for nothing.
        self.reach(positions.stop if isinstance(positions, slice) else int(positions.max()) + 1)
        cos_T1K, sin_T1K = self.cos_TK[positions].unsqueeze(1), self.sin_TK[positions].unsqueeze(1)
        return cos_T1K.to(dtype), sin_T1K.to(dtype)

    def reach(self, num_positions: int) -> None:
        """Make the tables long enough for these positions, if the context is."""
        length = len(self.cos_TK)
        if num_positions <= length or length == self._config.max_position_embeddings:
            return
        with torch.inference_mode(mode=False), torch.no_grad():
            tables = self._make(max(num_positions, 2 * length), self.cos_TK.device)
            self.cos_TK, self.sin_TK = (table_TK.to(self.cos_TK.dtype) for table_TK in tables)

    def _make(self, num_positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        config = self._config
        frequencies = rope_frequencies(config.head_dim, self._theta, self._scaling)
        scale = self._scaling.attention_factor if self._scaling else 1.0
        count = min(num_positions, config.max_position_embeddings)
        angles_TK = torch.outer(torch.arange(count, dtype=torch.float32), frequencies).repeat(1, 2)
        sign_K = torch.full((config.head_dim,), scale)
        sign_K[: config.head_dim // 2] *= -1  # folds the minus of rotate_half into the table
        return (angles_TK.cos() * scale).to(device=device), (angles_TK.sin() * sign_K).to(device=device)


def without_rotation(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return cosines of 1 and sines of 0, which leave queries and keys as they are, bit for bit."""
    return torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
