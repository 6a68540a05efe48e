"""How the compiled parts of a training step are called: see train_ops.c."""

import ctypes

import torch
from torch import Tensor

from models.kernels.build import library


def training_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of products that follow x, if x is trained through where these functions run; else None."""
    if not (torch.is_grad_enabled() and x.requires_grad and x.device.type == "cpu"):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    half = (torch.float32, torch.bfloat16)
    return dtype if x.dtype in half and dtype in half and library("train_ops") is not None else None


def run(name: str, call: ctypes.Structure, *, backward: bool = False) -> None:
    """Call a function of train_ops.c with what it is told, by torch's number of threads.

    Raises:
        MemoryError: if it finds none for itself.
    """
    if getattr(library("train_ops"), name)(ctypes.byref(call), int(backward), torch.get_num_threads()):
        raise MemoryError(f"{name} found no memory")


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where tensors lie in memory; None for none."""
    return [None if x is None else x.data_ptr() for x in tensors]
