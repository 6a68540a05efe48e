"""Where the compiled parts of a training step run, and in which dtype."""

import torch
from torch import Tensor

from models.kernels.build import library

_DTYPES = (torch.float32, torch.bfloat16)


def compiled_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of products that read x if compiled functions train through x here, else None."""
    if not (torch.is_grad_enabled() and x.requires_grad and x.device.type == "cpu"):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    fits = x.dtype in _DTYPES and dtype in _DTYPES
    return dtype if fits and library("train_ops") is not None else None
