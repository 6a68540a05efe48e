"""The operations between the matrix products of a layer, compiled for training on a CPU: see train_ops.c.

Each function does in one walk over its arguments, forward and backward, what torch's operations do in many,
with sums in fp32. Values are in fp32 or bf16. Gradients are the same bits on any number of threads.

B rows, T positions, S positions read, D model, F ffn, H query heads, G groups, K head dim.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.kernels.calls import pointers, run
from models.kernels.pack import PANEL, TYPES


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return RMSNorm (https://arxiv.org/abs/1910.07467) over the last dimension in `dtype`, and x.

    A caller that reads x as well takes it from here: its gradient is then added in the same walk.
    """
    both: tuple[Tensor, Tensor] = _Norm.apply(x.contiguous(), weight_D, eps, dtype)  # type: ignore[no-untyped-call]
    return both


def rope(
    qkv_BTNK: Tensor, heads: int, groups: int, cosines_TK: Tensor, sines_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [B, H, T, K] and keys [B, G, T, K], rotated, and values.

    Args:
        qkv_BTNK: queries, keys and values of N = H + 2 G heads, side by side.
        heads: H.
        groups: G.
        cosines_TK: cosines of the positions' angles; see `models.elastic.layers.Rotary`.
        sines_TK: sines, with the sign of the rotation.
    """
    tables = (cosines_TK.float().contiguous(), sines_TK.float().contiguous())
    rotated: tuple[Tensor, Tensor, Tensor] = _Rope.apply(  # type: ignore[no-untyped-call]
        qkv_BTNK.contiguous(), heads, groups, *tables
    )
    return rotated


def attention(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSK: Tensor,
    mask_TS: Tensor | None,
    recorded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return softmax attention [B, H, T, K] of each query head over its group's keys.

    Args:
        q_BHTK: queries.
        k_BGSK: keys, in the same dtype.
        v_BGSK: values.
        mask_TS: the keys that each query reads, one at least; None is causal, with S == T.
        recorded: keys and values that the mask names before the others, which get no gradients.
    """
    recorded = (k_BGSK[:, :, :0], v_BGSK[:, :, :0]) if recorded is None else recorded
    heads = (q_BHTK, k_BGSK, v_BGSK, *(x_BGSK.detach() for x_BGSK in recorded))
    assert len({x.dtype for x in heads}) == 1, [x.dtype for x in heads]
    mixed_BHTK: Tensor = _Attention.apply(*map(_contiguous_heads, heads), mask_TS)  # type: ignore[no-untyped-call]
    return mixed_BHTK


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up` (https://arxiv.org/abs/2002.05202)."""
    assert gate.dtype == up.dtype, (gate.dtype, up.dtype)
    y: Tensor = _Gate.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call]
    return y


# ---------------------------------------------------------------- arguments of train_ops.c


class _Heads(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("row", "head", "position")),
    )


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                "type",
                "rows",
                "groups",
                "heads_per_group",
                "num_queries",
                "num_keys",
                "num_recorded",
                "size",
            )
        ),
        ("bias", ctypes.c_void_p),
        ("bias_step", ctypes.c_int64),
        *((name, _Heads) for name in ("queries", "keys", "values", "mixed")),
        *((name, _Heads) for name in ("recorded_keys", "recorded_values")),
        ("log_sums", ctypes.c_void_p),
        *((name, _Heads) for name in ("mixed_grad", "queries_grad", "keys_grad", "values_grad")),
    )


class _NormCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "result_type")),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        ("epsilon", ctypes.c_float),
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight", "inverse", "y", "y_grad", "residual_grad", "x_grad", "weight_grad")
        ),
    )


class _RopeCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "rows", "positions", "heads", "groups", "size")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "qkv")),
        *((name, _Heads) for name in ("queries", "keys", "values")),
    )


class _GateCall(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "y", "y_grad", "gate_grad", "up_grad")),
    )


def _heads(x_BHTK: Tensor) -> _Heads:
    return _Heads(x_BHTK.data_ptr(), *x_BHTK.stride()[:3])


def _contiguous_heads(x_BHTK: Tensor) -> Tensor:
    """Return x with contiguous heads; the other strides may be any."""
    return x_BHTK if x_BHTK.stride(3) == 1 else x_BHTK.contiguous()


def _new_heads(x_BHTK: Tensor) -> Tensor:
    """Return an empty tensor, in memory [B, T, H, K]: the layout of the projections around attention."""
    return x_BHTK.new_empty(x_BHTK.transpose(1, 2).shape).transpose(1, 2)


# ---------------------------------------------------------------- the functions


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide_D = weight_D.float().contiguous()
        y, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.shape = (TYPES[x.dtype], TYPES[dtype], inverse.numel(), x.shape[-1], eps)
        run("nestling_norm", _NormCall(*ctx.shape, *pointers(x, wide_D, inverse, y)))
        return y, x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_D, inverse = ctx.saved_tensors
        if grad_y is None:
            return residual, None, None, None
        wide_D, grad_y = weight_D.float().contiguous(), grad_y.contiguous()
        residual = None if residual is None else residual.contiguous()
        grad_x, grad_D = torch.empty_like(x), torch.empty_like(wide_D)
        places = (*pointers(x, wide_D, inverse), None, *pointers(grad_y, residual, grad_x, grad_D))
        run("nestling_norm", _NormCall(*ctx.shape, *places), backward=True)
        return grad_x, grad_D.to(weight_D.dtype), None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_BTNK: Tensor, heads: int, groups: int, cosines_TK: Tensor, sines_TK: Tensor
    ) -> tuple[Tensor, ...]:
        rows, positions, _, size = qkv_BTNK.shape
        placed = tuple(
            qkv_BTNK.new_empty(rows, positions, count, size).transpose(1, 2)
            for count in (heads, groups, groups)
        )
        ctx.save_for_backward(cosines_TK, sines_TK)
        ctx.shape = (TYPES[qkv_BTNK.dtype], rows, positions, heads, groups, size)
        places = pointers(cosines_TK, sines_TK, qkv_BTNK)
        call = _RopeCall(*ctx.shape, *places, *map(_heads, placed))
        run("nestling_place", call)
        return placed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cosines_TK, sines_TK = ctx.saved_tensors
        _, rows, positions, heads, groups, size = ctx.shape
        grads = tuple(map(_contiguous_heads, grads))
        qkv_BTNK = grads[0].new_empty(rows, positions, heads + 2 * groups, size)
        places = pointers(cosines_TK, sines_TK, qkv_BTNK)
        call = _RopeCall(*ctx.shape, *places, *map(_heads, grads))
        run("nestling_place", call, backward=True)
        return qkv_BTNK, None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, recorded_k: Tensor, recorded_v: Tensor,
        mask_TS: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mixed_BHTK, log_sums_BHT = _new_heads(q_BHTK), q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32)
        bias = _causal_bias(k_BGSK.shape[2]) if mask_TS is None else _bias(mask_TS)
        tensors = (q_BHTK, k_BGSK, v_BGSK, mixed_BHTK, recorded_k, recorded_v, log_sums_BHT, bias)
        ctx.causal = mask_TS is None
        ctx.save_for_backward(*tensors)
        run("nestling_attention", _Attention.call(ctx.causal, *tensors))
        return mixed_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        grad_BHTK = _contiguous_heads(grad_BHTK)
        dq_BHTK, dk_BGSK, dv_BGSK = map(_new_heads, ctx.saved_tensors[:3])
        call = _Attention.call(ctx.causal, *ctx.saved_tensors)
        call.mixed_grad, call.queries_grad = _heads(grad_BHTK), _heads(dq_BHTK)
        call.keys_grad, call.values_grad = _heads(dk_BGSK), _heads(dv_BGSK)
        run("nestling_attention", call, backward=True)
        return dq_BHTK, dk_BGSK, dv_BGSK, None, None, None

    @staticmethod
    def call(causal: bool, q_BHTK: Tensor, k_BGSK: Tensor, *tensors: Tensor) -> _AttentionCall:
        *others, log_sums_BHT, bias = tensors  # values, results, recorded keys and values
        rows, heads, num_queries, size = q_BHTK.shape
        groups, num_keys, num_recorded = *k_BGSK.shape[1:3], others[-1].shape[2]
        # The causal bias is one row of zeros and infinities: an earlier query starts further right in it.
        start, step = (len(bias) // 2 - 1, -1) if causal else (0, bias.shape[1])
        return _AttentionCall(
            TYPES[q_BHTK.dtype], rows, groups, heads // groups, num_queries, num_recorded + num_keys,
            num_recorded, size, bias.data_ptr() + start * bias.element_size(), step,
            *map(_heads, (q_BHTK, k_BGSK, *others)), log_sums_BHT.data_ptr(),
        )  # fmt: skip


@functools.lru_cache(maxsize=1)  # the layers of a pass read by one mask
def _bias(mask_TS: Tensor) -> Tensor:
    """Return 0 for the keys that are read, minus infinity for others, padded to whole panels.

    >>> _bias(torch.tensor([[True, False]])).shape, _bias(torch.tensor([[True, False]]))[0, :3]
    (torch.Size([1, 32]), tensor([0., -inf, -inf]))
    """
    mask_TS = F.pad(mask_TS, (0, -mask_TS.shape[1] % PANEL))
    return torch.zeros(mask_TS.shape, dtype=torch.float32).masked_fill_(~mask_TS, -torch.inf)


@functools.lru_cache
def _causal_bias(num_positions: int) -> Tensor:
    """Return a zero for each position, padded to whole panels, then as many minus infinities."""
    width = num_positions + -num_positions % PANEL
    return torch.tensor([0.0, -torch.inf]).repeat_interleave(width)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        run("nestling_gate", _GateCall(TYPES[gate.dtype], gate.numel(), *pointers(gate, up, y)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad, grads = grad.contiguous(), (torch.empty_like(gate), torch.empty_like(up))
        places = (*pointers(gate, up), None, *pointers(grad, *grads))
        run("nestling_gate", _GateCall(TYPES[gate.dtype], gate.numel(), *places), backward=True)
        return grads
