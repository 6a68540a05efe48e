"""How the compiled parts of a training step are called: see train_ops.c."""

import ctypes

import torch
from torch import Tensor

from models.kernels.build import library


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
