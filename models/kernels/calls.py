"""Calls of the compiled parts of a training step: see train_ops.c."""

import ctypes

import torch
from torch import Tensor

from models.kernels.build import library


def run(name: str, call: ctypes.Structure, *, backward: bool = False) -> None:
    """Call a function of train_ops.c on torch's number of threads.

    Raises:
        MemoryError: if it finds no memory for its workspace.
    """
    if getattr(library("train_ops"), name)(ctypes.byref(call), int(backward), torch.get_num_threads()):
        raise MemoryError(f"{name} found no memory")


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Return the addresses of tensors; None for None."""
    return [None if x is None else x.data_ptr() for x in tensors]
