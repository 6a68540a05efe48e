"""Losses of logits that are trained on a CPU, compiled: see train_ops.c.

Logits are read in fp32 or bf16; intermediate values are fp32 and are never stored as an array.

N tokens, V vocabulary.
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


def _pair(kind: int, target_NV: Tensor, draft_NV: Tensor, temperature: float) -> Tensor:
    both = (x_NV if x_NV.stride(1) == 1 else x_NV.contiguous() for x_NV in (target_NV.detach(), draft_NV))
    value_N: Tensor = _Pair.apply(kind, *both, temperature)  # type: ignore[no-untyped-call]
    return value_N


_OVERLAP, _FORWARD_KL = range(2)
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
        ("log_sums", ctypes.c_void_p),
    )


class _PairCall(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        *((name, _Side) for name in ("target", "draft")),
        *((name, ctypes.c_int64) for name in ("rows", "size")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("values", "sums", "value_grads", "draft_grad")),
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
        value_N, *sums = (torch.empty(len(draft_NV), dtype=torch.float32) for _ in range(4))
        ctx.kind, ctx.temperature = kind, temperature
        ctx.save_for_backward(target_NV, draft_NV, *sums)
        call = _Pair.call(kind, temperature, target_NV, draft_NV, *sums)
        call.values = value_N.data_ptr()
        run("nestling_pair", call)
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[None, None, Tensor, None]:
        grad_N, grad_NV = grad_N.contiguous(), ctx.saved_tensors[1].new_empty(ctx.saved_tensors[1].shape)
        call = _Pair.call(ctx.kind, ctx.temperature, *ctx.saved_tensors)
        call.value_grads, call.draft_grad = pointers(grad_N, grad_NV)
        run("nestling_pair", call, backward=True)
        return None, None, grad_NV, None

    @staticmethod
    def call(
        kind: int, temperature: float, target_NV: Tensor, draft_NV: Tensor, of_target_N: Tensor,
        of_draft_N: Tensor, sums_N: Tensor,
    ) -> _PairCall:  # fmt: skip
        sides = ((target_NV, of_target_N), (draft_NV, of_draft_N))
        target, draft = (
            _Side(TYPES[x_NV.dtype], x_NV.data_ptr(), x_NV.stride(0), logs_N.data_ptr())
            for x_NV, logs_N in sides
        )
        return _PairCall(kind, target, draft, *draft_NV.shape, 1 / temperature, sums=sums_N.data_ptr())
