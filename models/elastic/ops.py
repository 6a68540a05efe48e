"""Operations between the products of a layer, and four losses: each decides here between C and torch.

Where a tensor is trained through on a CPU, in fp32 or bf16, the compiled functions of
models/kernels/train_ops.c do in one walk over memory, forward and backward, what torch's operations do in
many. Everywhere else, and where nothing could be compiled, torch's operations run. Nothing else in the model
or in a loss asks which. (Decoding does not come here where models/packed/decode_step.py runs whole passes.)

B rows, T positions, S positions read, D model, F ffn, H query heads, G groups, R heads per group, K head dim,
N tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.base.labels import IGNORE_INDEX
from models.elastic.compiled import compiled_dtype
from models.elastic.linear import LowRank, NestedLinear, stack
from models.kernels import train_losses, train_ops
from models.kernels.pack import TYPES

TINY = torch.finfo(torch.float32).tiny
LOG_TINY = math.log(TINY)
"""Logarithms of probabilities below it count as it."""
MIN_SQUARE = 1e-6
"""Squared length below which a hidden state counts as this long: one of zeros has no direction."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, wide: bool = False) -> Tensor:
    """Return RMSNorm over the last dimension (https://arxiv.org/abs/1910.07467), with statistics in fp32.

    Its dtype is that of x; trained under autocast on a CPU, that of the products that read it.

    Args:
        x: what is normalised.
        weight_D: the gains.
        eps: epsilon.
        wide: multiply by the gains in fp32 as well, and round afterwards (Gemma).
    """
    dtype = compiled_dtype(x)
    if dtype is not None:
        return train_ops.rms_norm(x, weight_D, eps, dtype)[0]
    if wide:
        return F.rms_norm(x.to(weight_D.dtype), weight_D.shape, weight_D, eps).to(x.dtype)
    return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)


def pre_norm_residual(
    x: Tensor, weight_D: Tensor, eps: float, branch: Callable[[Tensor], Tensor], *, wide: bool = False
) -> Tensor:
    """Return `x + branch(rms_norm(x))`."""
    dtype = compiled_dtype(x)
    if dtype is None:
        return x + branch(rms_norm(x, weight_D, eps, wide=wide))
    # The norm returns x as well: its backward pass adds x's two gradients in the walk that it makes anyway.
    # Left to autograd, that sum takes 1 to 2 % of a training step.
    normed, x = train_ops.rms_norm(x, weight_D, eps, dtype)
    return x + branch(normed)


def fused_linear(
    x: Tensor, maps: Sequence[NestedLinear], rows: Sequence[int], additions: Sequence[LowRank | None]
) -> Tensor:
    """Return the first `rows` outputs of each of several maps of the same input, concatenated."""
    if compiled_dtype(x) is None:
        each = zip(maps, rows, additions, strict=True)
        return torch.cat([one(x, count, addition) for one, count, addition in each], -1)
    # One large product takes less time than several, and less memory than concatenating their results.
    return F.linear(x, *stack(maps, rows, x, additions))


def rope(qkv_BTNK: Tensor, heads: int, groups: int, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return queries [B, H, T, K] and keys [B, G, T, K], rotated, and values [B, G, T, K].

    Args:
        qkv_BTNK: queries, keys and values of N = H + 2 G heads, side by side.
        heads: H.
        groups: G.
        rotary: cosines and signed sines [T, 1, K]; see `models.elastic.layers.Rotary`.
    """
    if compiled_dtype(qkv_BTNK) is not None:
        return train_ops.rope(qkv_BTNK, heads, groups, *(table_T1K.squeeze(1) for table_T1K in rotary))
    rotated_BTNK, v_BTGK = qkv_BTNK.split((heads + groups, groups), dim=2)
    q_BTHK, k_BTGK = rotate(rotated_BTNK, *rotary).split((heads, groups), dim=2)
    # A copy of v: as a slice it would keep queries and keys alive for its sake in training.
    return q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2).contiguous()


def rotate(x_BTHK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotate each head's vector by its position's angles; linear, norm preserving.

    It is computed in the precision of the tables: autocast's narrower vectors are widened first, as sums of
    two precisions are slow.
    """
    x_BTHK = x_BTHK.to(cos_T1K.dtype)
    swapped_BTHK = x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BTHK * cos_T1K, swapped_BTHK, sin_T1K)


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask_TS: Tensor | None,
    recorded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return softmax attention [B, H, T, K] of each query head over its group's keys.

    It is computed in the dtype of keys and values, which may be wider than that of the queries.
    With few new tokens a group's query heads are laid out as rows of one matrix product, so that
    keys and values are read once a group and never repeated in memory.

    Args:
        q_BHTK: queries.
        k_BGSK: keys.
        v_BGSK: values.
        mask_TS: see `models.elastic.cache.Reading`.
        recorded: see there.
    """
    q_BHTK = q_BHTK.to(k_BGSK.dtype)
    if recorded is not None:
        if compiled_dtype(q_BHTK) is not None:
            return train_ops.attention(q_BHTK, k_BGSK, v_BGSK, mask_TS, recorded)
        k_BGSK, v_BGSK = (torch.cat(pair, dim=2) for pair in zip(recorded, (k_BGSK, v_BGSK), strict=True))
    num_rows, heads, num_tokens, head_dim = q_BHTK.shape
    groups = k_BGSK.shape[1]
    causal = mask_TS is None and num_tokens == k_BGSK.shape[2]
    masked = mask_TS is not None and mask_TS.dtype == torch.bool and len(mask_TS) == num_tokens
    if (causal or masked) and compiled_dtype(q_BHTK) is not None:
        return train_ops.attention(q_BHTK, k_BGSK, v_BGSK, mask_TS)
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


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, whose gradient will be multiplied by a factor on its way back."""
    if factor == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    scaled: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up` (https://arxiv.org/abs/2002.05202)."""
    return F.silu(gate) * up if compiled_dtype(gate) is None else train_ops.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `gelu(gate) * up` (https://arxiv.org/abs/2002.05202), with the tanh approximation of GELU."""
    return F.gelu(gate, approximate="tanh") * up


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the negative log-likelihood [N] of each label, in nats, fp32 or wider; 0 at `IGNORE_INDEX`."""
    if compiled_dtype(logits_NV) is not None:
        return train_losses.cross_entropy(logits_NV, labels_N)  # ignores every negative label
    logits_NV = logits_NV.to(at_least_fp32(logits_NV.dtype))
    return F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=IGNORE_INDEX)


def overlap(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float) -> Tensor:
    """Return the sum [N] of min(p, q) at a temperature: the expected acceptance of a drafted token."""
    if _only_draft_learns(target_logits_NV, draft_logits_NV):
        return train_losses.overlap(target_logits_NV, draft_logits_NV, temperature)
    overlap_N: Tensor = _Overlap.apply(target_logits_NV, draft_logits_NV, temperature)  # type: ignore[no-untyped-call]
    return overlap_N


def forward_kl(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float) -> Tensor:
    """Return KL(p, q) [N] at a temperature, in nats, fp32 or wider."""
    if _only_draft_learns(target_logits_NV, draft_logits_NV):
        return train_losses.forward_kl(target_logits_NV, draft_logits_NV, temperature)
    return kl(log_softmax(target_logits_NV, temperature), log_softmax(draft_logits_NV, temperature))


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Return KL(p, q) [N]; both logarithms are capped, so that no 0 * inf and no inf - inf can arise."""
    gap_NV = log_p_NV.clamp_min(LOG_TINY) - log_q_NV.clamp_min(LOG_TINY)
    return (log_p_NV.exp() * gap_NV).sum(-1).clamp_min(0.0)  # rounding can reach below 0


def cosine_distance(target_states_ND: Tensor, states_ND: Tensor) -> Tensor:
    """Return 1 minus the cosine [N] of each pair of vectors, fp32 or wider; only the second ones learn."""
    if _only_draft_learns(target_states_ND, states_ND):
        return train_losses.cosine_distance(target_states_ND, states_ND)
    distance_N: Tensor = _CosineDistance.apply(target_states_ND, states_ND)  # type: ignore[no-untyped-call]
    return distance_N


def _only_draft_learns(target: Tensor, draft: Tensor) -> bool:
    """Return whether compiled functions compare these."""
    frozen = not target.requires_grad and target.dtype in TYPES
    return frozen and compiled_dtype(draft) is not None


def log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """Return logarithms of probabilities [N, V] at a temperature, in fp32 or wider."""
    assert temperature > 0, temperature
    logits_NV = logits_NV.to(at_least_fp32(logits_NV.dtype))
    return (logits_NV if temperature == 1 else logits_NV / temperature).log_softmax(-1)


def softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    """Return probabilities [N, V] at a temperature, in fp32 or wider."""
    assert temperature > 0, temperature
    dtype = at_least_fp32(logits_NV.dtype)
    if temperature == 1:
        return logits_NV.softmax(-1, dtype=dtype)  # reads half precision as it is
    return (logits_NV.to(dtype) / temperature).softmax(-1)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: half precision is raised to fp32."""
    return torch.promote_types(dtype, torch.float32)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Overlap(torch.autograd.Function):
    """Sum of min(p, q), with its backward pass written out: autograd's takes several times as long on a CPU.

    The gradient of a logit of q is `q_j ([q_j < p_j] - sum of q where q < p)`; of p, with both exchanged.
    """

    @staticmethod
    def forward(ctx: Any, target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float) -> Tensor:
        p_NV, q_NV = softmax(target_logits_NV, temperature), softmax(draft_logits_NV, temperature)
        ctx.save_for_backward(p_NV, q_NV)
        ctx.temperature, ctx.dtypes = temperature, (target_logits_NV.dtype, draft_logits_NV.dtype)
        # Over the sum of p, which is 1 but for rounding, so that it is 1 at p = q.
        return torch.minimum(p_NV, q_NV).sum(-1) / p_NV.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        p_NV, q_NV = ctx.saved_tensors
        scale_N1 = grad_N.unsqueeze(-1) / ctx.temperature
        sides = zip((p_NV, q_NV), (q_NV, p_NV), ctx.needs_input_grad, ctx.dtypes, strict=False)
        to_p, to_q = (
            _overlap_gradient(own_NV, other_NV, scale_N1).to(dtype) if wanted else None
            for own_NV, other_NV, wanted, dtype in sides
        )
        return to_p, to_q, None


def _overlap_gradient(own_NV: Tensor, other_NV: Tensor, scale_N1: Tensor) -> Tensor:
    is_smaller_NV = torch.lt(own_NV, other_NV, out=torch.empty_like(own_NV))  # a bool is slow to multiply
    smaller_NV = is_smaller_NV.mul_(own_NV)
    return smaller_NV.addcmul_(own_NV, smaller_NV.sum(-1, keepdim=True), value=-1).mul_(scale_N1)


class _CosineDistance(torch.autograd.Function):
    """The gradient is made with the value, so that neither side's states nor copies are kept for it."""

    @staticmethod
    def forward(ctx: Any, target_states_ND: Tensor, states_ND: Tensor) -> Tensor:
        wide = at_least_fp32(states_ND.dtype)
        ours_ND, theirs_ND = states_ND.to(wide), target_states_ND.to(wide)
        # Sums of products: autocast would round what vecdot reads, and near cosines would vanish.
        square_N = ours_ND.square().sum(-1).clamp_min(MIN_SQUARE)
        scale_N = (square_N * theirs_ND.square().sum(-1).clamp_min(MIN_SQUARE)).rsqrt()
        cosine_N: Tensor = (ours_ND * theirs_ND).sum(-1) * scale_N
        if ctx.needs_input_grad[1]:
            gradient_ND = (cosine_N / square_N)[:, None] * ours_ND - scale_N[:, None] * theirs_ND
            ctx.save_for_backward(gradient_ND.to(states_ND.dtype))
        return 1 - cosine_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[None, Tensor]:
        (gradient_ND,) = ctx.saved_tensors
        return None, gradient_N[:, None].to(gradient_ND.dtype) * gradient_ND
