"""Grouped-query attention (https://arxiv.org/abs/2305.13245) over a prefix of the key/value groups.

B batch, T new positions, S positions read, D model, H query heads, G groups, R heads per group, K head dim.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.cache import Memory, Reading, Readings
from models.elastic.config import ElasticConfig
from models.elastic.layers import NestedLinear, NestedMap, RMSNorm, rotate
from models.kernels.calls import training_dtype
from models.kernels.train_ops import attention, place


class Attention(nn.Module):
    """Self-attention whose first `groups` key/value groups, with their query heads, run."""

    def __init__(self, config: ElasticConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads_per_group = config.heads_per_group
        size, bias = config.hidden_size, config.attention_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj: NestedMap = NestedLinear(size, queries, bias=bias)
        self.k_proj: NestedMap = NestedLinear(size, keys, bias=bias)
        self.v_proj: NestedMap = NestedLinear(size, keys, bias=bias)
        self.o_proj: NestedMap = NestedLinear(queries, size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        groups: int,
        rotary: tuple[Tensor, Tensor],
        memory: Memory | None,
        residual_BTD: Tensor,
    ) -> Tensor:
        """Add what `groups` groups make of x to the residual stream [B, T, D].

        `memory` takes the new keys and values and says what to read.
        """
        heads = groups * self.heads_per_group
        q_BHTK, k_BGTK, v_BGTK = self._project(x_BTD, heads, groups, rotary)
        reading: Reading | Readings = Reading(k_BGTK, v_BGTK, None)
        if memory is not None:
            reading = memory.extend(self.layer, k_BGTK, v_BGTK)
        if isinstance(reading, Readings):
            parts = zip(q_BHTK.split(reading.counts, dim=2), reading.each, strict=True)
            mixed_BHTK = torch.cat([attend(q_BHTK, one) for q_BHTK, one in parts], dim=2)
        else:
            mixed_BHTK = attend(q_BHTK, reading)
        mixed_BTW = mixed_BHTK.to(x_BTD.dtype).transpose(1, 2).flatten(2)
        return self.o_proj.prefix(
            mixed_BTW, rows=x_BTD.shape[-1], columns=mixed_BTW.shape[-1], finish="add", other=residual_BTD
        )

    def _project(
        self, x_BTD: Tensor, heads: int, groups: int, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K] and keys [B, G, T, K], in place, and values."""
        rows = [count * self.head_dim for count in (heads, groups, groups)]
        y_BTW = self.q_proj.beside((self.k_proj, self.v_proj), x_BTD, rows=rows)
        y_BTNK: Tensor = y_BTW.unflatten(-1, (heads + 2 * groups, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK, v_BTGK = y_BTNK.split((heads, groups, groups), dim=2)
            y_BTNK = torch.cat([self.q_norm(q_BTHK), self.k_norm(k_BTGK), v_BTGK], dim=2)
        if training_dtype(y_BTNK) is not None:
            return place(y_BTNK, heads, groups, *(table_T1K.squeeze(1) for table_T1K in rotary))
        placed_BTNK, v_BTGK = y_BTNK.split((heads + groups, groups), dim=2)
        q_BTHK, k_BTGK = rotate(placed_BTNK, *rotary).split((heads, groups), dim=2)
        # A copy of v: training would keep queries and keys as well, of which it is a slice, for its sake.
        return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2).contiguous()


def attend(q_BHTK: Tensor, reading: Reading) -> Tensor:
    """Softmax attention [B, H, T, K] of each query head over its group's keys.

    It is computed in the dtype of what is read, which may be wider than the pass's.
    With few new tokens a group's query heads are laid out as rows of one matrix product, so that
    keys and values are read once a group and never repeated in memory.
    """
    k_BGSK, v_BGSK, mask_TS = reading
    q_BHTK = q_BHTK.to(k_BGSK.dtype)
    num_rows, heads, num_tokens, head_dim = q_BHTK.shape
    groups = k_BGSK.shape[1]
    causal = mask_TS is None and num_tokens == k_BGSK.shape[2]
    if training_dtype(q_BHTK) is not None:
        masked = mask_TS is not None and mask_TS.dtype == torch.bool and len(mask_TS) == num_tokens
        if causal or masked:
            return attention(q_BHTK, k_BGSK, v_BGSK, mask_TS)
    if causal:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, is_causal=num_tokens > 1, enable_gqa=groups != heads
        )
    repeats = heads // groups
    if mask_TS is not None and len(mask_TS) != repeats * num_tokens:
        mask_TS = mask_TS.repeat(repeats, 1)
    q_BGRK = q_BHTK.reshape(num_rows, groups, repeats * num_tokens, head_dim)
    mixed_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=mask_TS)
    return mixed_BGRK.reshape(num_rows, heads, num_tokens, head_dim)
