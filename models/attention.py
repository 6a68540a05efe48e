"""Grouped-query attention (https://arxiv.org/abs/2305.13245) over a prefix of the key/value groups.

B batch, T new positions, S positions read, D model, H query heads, G groups, R heads per group, K head dim.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from models.cache import Memory, Reading
from models.config import ElasticConfig
from models.layers import NestedLinear, NestedMap, RMSNorm, rotate


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
    ) -> Tensor:
        """Map [B, T, D] to [B, T, D]; `memory` takes the new keys and values and says what to read.

        The scores are computed in the dtype of what is read, which may be wider than this pass's.
        """
        num_rows, num_tokens, size = x_BTD.shape
        heads = groups * self.heads_per_group
        q_BHTK = self._project(x_BTD, self.q_proj, heads, self.q_norm)
        k_BGTK = self._project(x_BTD, self.k_proj, groups, self.k_norm)
        v_BGTK = self._project(x_BTD, self.v_proj, groups, None)
        q_BHTK, k_BGTK = rotate(q_BHTK, *rotary), rotate(k_BGTK, *rotary)
        reading = Reading(k_BGTK, v_BGTK, None)
        if memory is not None:
            reading = memory.extend(self.layer, k_BGTK, v_BGTK)
        mixed_BHTK = attend(q_BHTK.to(reading.k_BGSK.dtype), reading).to(x_BTD.dtype)
        width = heads * self.head_dim
        mixed_BTW = mixed_BHTK.transpose(1, 2).reshape(num_rows, num_tokens, width)
        return self.o_proj.prefix(mixed_BTW, rows=size, columns=width)

    def _project(self, x_BTD: Tensor, linear: NestedMap, heads: int, norm: RMSNorm | None) -> Tensor:
        rows = heads * self.head_dim
        y_BTW = linear.prefix(x_BTD, rows=rows, columns=x_BTD.shape[-1])
        y_BTHK: Tensor = y_BTW.unflatten(-1, (heads, self.head_dim))
        if norm is not None:
            y_BTHK = norm(y_BTHK)
        return y_BTHK.transpose(1, 2)


def attend(q_BHTK: Tensor, reading: Reading) -> Tensor:
    """Softmax attention [B, H, T, K] of each query head over its group's keys.

    With few new tokens a group's query heads are laid out as rows of one matrix product, so that
    keys and values are read once a group and never repeated in memory.
    """
    k_BGSK, v_BGSK, mask_TS = reading
    num_rows, heads, num_tokens, head_dim = q_BHTK.shape
    groups = k_BGSK.shape[1]
    if mask_TS is None and num_tokens == k_BGSK.shape[2]:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, is_causal=num_tokens > 1, enable_gqa=groups != heads
        )
    repeats = heads // groups
    q_BGRK = q_BHTK.reshape(num_rows, groups, repeats * num_tokens, head_dim)
    mask_RS = None if mask_TS is None or repeats == 1 else mask_TS.repeat(repeats, 1)
    mixed_BGRK = F.scaled_dot_product_attention(
        q_BGRK, k_BGSK, v_BGSK, attn_mask=mask_TS if repeats == 1 else mask_RS
    )
    return mixed_BGRK.reshape(num_rows, heads, num_tokens, head_dim)
