"""Losses of logits and hidden states that are trained on a CPU, compiled: see train_ops.c.

They are read in fp32 or bf16; intermediate values are fp32 and are never stored as an array.

N tokens, V vocabulary, D model.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.calls import pointers, run
from models.kernels.pack import TYPES


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the negative log-likelihood [N] of each label, in nats and fp32; 0 for labels below 0."""
    assert labels_N.dtype == torch.int64, labels_N.dtype
    loss_N: Tensor = _CrossEntropy.apply(logits_NV.contiguous(), labels_N.contiguous())  # type: ignore[no-untyped-call]
    return loss_N


def overlap(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float) -> Tensor:
    """Return the sum [N] of min(p, q) at a temperature, in fp32; only the draft q learns."""
    return _pair(_OVERLAP, target_logits_NV, draft_logits_NV, temperature)


def forward_kl(target_logits_NV: Tensor, draft_logits_NV: Tensor, temperature: float) -> Tensor:
    """Return KL(p, q) [N] at a temperature, in fp32; only the draft q learns."""
    return _pair(_FORWARD_KL, target_logits_NV, draft_logits_NV, temperature)


def cosine_distance(target_ND: Tensor, states_ND: Tensor) -> Tensor:
    """Return 1 minus the cosine [N] of each pair of vectors, in fp32; only the second ones learn."""
    return _pair(_DIRECTION, target_ND, states_ND, 1.0)


def _pair(kind: int, target_NV: Tensor, draft_NV: Tensor, temperature: float) -> Tensor:
    both = (x_NV if x_NV.stride(1) == 1 else x_NV.contiguous() for x_NV in (target_NV.detach(), draft_NV))
    value_N: Tensor = _Pair.apply(kind, *both, temperature)  # type: ignore[no-untyped-call]
    return value_N


_OVERLAP, _FORWARD_KL, _DIRECTION = range(3)
"""Kinds of a pair; see train_ops.c."""


class _EntropyCall(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "labels", "losses", "log_sums", "loss_grads", "logits_grad")
        ),
    )


class _Side(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("logits", ctypes.c_void_p),
        ("row", ctypes.c_int64),
    )


class _PairCall(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        *((name, _Side) for name in ("target", "draft")),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("values", "slopes", "value_grads", "draft_grad")),
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        loss_N, log_sums_N = (torch.empty(len(labels_N), dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(logits_NV, labels_N, log_sums_N)
        ctx.shape = (TYPES[logits_NV.dtype], *logits_NV.shape)
        run(
            "nestling_cross_entropy",
            _EntropyCall(*ctx.shape, *pointers(logits_NV, labels_N, loss_N, log_sums_N)),
        )
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, labels_N, log_sums_N = ctx.saved_tensors
        grad_N, grad_NV = grad_N.contiguous(), torch.empty_like(logits_NV)
        places = pointers(logits_NV, labels_N, None, log_sums_N, grad_N, grad_NV)
        run("nestling_cross_entropy", _EntropyCall(*ctx.shape, *places), backward=True)
        return grad_NV, None


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: int, target_NV: Tensor, draft_NV: Tensor, temperature: float) -> Tensor:
        value_N = torch.empty(len(draft_NV), dtype=torch.float32)
        slope_NV = draft_NV.new_empty(draft_NV.shape)
        ctx.save_for_backward(slope_NV)
        sides = (_Side(TYPES[x_NV.dtype], x_NV.data_ptr(), x_NV.stride(0)) for x_NV in (target_NV, draft_NV))
        places = pointers(value_N, slope_NV)
        run("nestling_pair", _PairCall(kind, *sides, *slope_NV.shape, 1 / temperature, *places))
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[None, None, Tensor, None]:
        (slope_NV,) = ctx.saved_tensors
        grad_N, grad_NV = grad_N.contiguous(), torch.empty_like(slope_NV)
        call = _PairCall(draft=_Side(TYPES[slope_NV.dtype]), rows=len(slope_NV), size=slope_NV.shape[1])
        call.slopes, call.value_grads, call.draft_grad = pointers(slope_NV, grad_N, grad_NV)
        run("nestling_pair", call, backward=True)
        return None, None, grad_NV, None
