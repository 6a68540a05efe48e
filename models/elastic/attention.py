"""Grouped-query attention (https://arxiv.org/abs/2305.13245) over a prefix of the key/value groups.

B batch, T new positions, D model, H query heads, G groups, K head dim.
"""

import torch
from torch import Tensor, nn

from models.elastic import ops
from models.elastic.cache import Memory, Readings, read_window
from models.elastic.config import ElasticConfig
from models.elastic.linear import NestedLinear
from models.elastic.norm import RMSNorm
from models.elastic.owned import OwnedAttention


class Attention(nn.Module):
    """Self-attention whose first `groups` key/value groups, with their query heads, run."""

    def __init__(self, config: ElasticConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads_per_group = config.heads_per_group
        self.window = config.window(layer)
        # Scores are divided by the root of head_dim; this makes it the root of what the model asks for.
        scalar = config.query_pre_attn_scalar
        self.query_scale = (config.head_dim / scalar) ** 0.5 if scalar else 1.0
        size, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = NestedLinear(size, queries, bias=bias)
        self.k_proj = NestedLinear(size, keys, bias=bias)
        self.v_proj = NestedLinear(size, keys, bias=bias)
        self.o_proj = NestedLinear(queries, size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        groups: int,
        rotary: tuple[Tensor, Tensor],
        memory: Memory | None,
        owned: OwnedAttention,
    ) -> Tensor:
        """Return what `groups` groups make of x; `memory` takes keys and values and says what to read."""
        q_BHTK, k_BGTK, v_BGTK = self._project(x_BTD, groups, rotary, owned)
        if self.query_scale != 1:
            q_BHTK = q_BHTK * self.query_scale
        if memory is None:
            reading = read_window(k_BGTK, v_BGTK, k_BGTK.shape[2], self.window)
        else:
            reading = memory.extend(self.layer, k_BGTK, v_BGTK, self.window)
        if isinstance(reading, Readings):
            parts = zip(q_BHTK.split(reading.counts, dim=2), reading.each, strict=True)
            mixed_BHTK = torch.cat([ops.attention(part_BHTK, *one) for part_BHTK, one in parts], dim=2)
        else:
            mixed_BHTK = ops.attention(q_BHTK, *reading)
        y_BTD: Tensor = self.o_proj(mixed_BHTK.to(x_BTD.dtype).transpose(1, 2).flatten(2), None, owned.o_proj)
        return y_BTD

    def _project(
        self, x_BTD: Tensor, groups: int, rotary: tuple[Tensor, Tensor], owned: OwnedAttention
    ) -> tuple[Tensor, ...]:
        """Return queries [B, H, T, K] and keys [B, G, T, K], rotated, and values."""
        counts = (groups * self.heads_per_group, groups, groups)
        maps, rows = (self.q_proj, self.k_proj, self.v_proj), [count * self.head_dim for count in counts]
        additions = (owned.q_proj, owned.k_proj, owned.v_proj)
        qkv_BTNK = ops.fused_linear(x_BTD, maps, rows, additions).unflatten(-1, (sum(counts), self.head_dim))
        q_norm, k_norm = owned.q_norm or self.q_norm, owned.k_norm or self.k_norm
        if q_norm is not None and k_norm is not None:
            q_BTHK, k_BTGK, v_BTGK = qkv_BTNK.split(counts, dim=2)
            qkv_BTNK = torch.cat([q_norm(q_BTHK), k_norm(k_BTGK), v_BTGK], dim=2)
        return ops.rope(qkv_BTNK, *counts[:2], rotary)
