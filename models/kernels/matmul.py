"""One product of the compiled step on its own: for timing it, and for checking it."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from models.kernels.build import library
from models.kernels.pack import INPUTS_PER_ENTRY, make_panels


def compiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether there is a compiled product here for weights of this dtype."""
    return dtype in INPUTS_PER_ENTRY and device.type == "cpu" and library() is not None


def compiled_product(
    weight_OI: Tensor, dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor] | None:
    """Return the product with a weight, packed in a dtype or as it is, from x [..., I] to fp32 [..., O].

    It is None where the compiled step cannot run it.
    """
    compiled = library() if compiles(dtype or weight_OI.dtype, weight_OI.device) else None
    num_outputs, num_inputs = weight_OI.shape
    if compiled is None or ((dtype or weight_OI.dtype) == torch.bfloat16 and num_inputs % 2):
        return None
    run, panels = compiled.nestling_product, make_panels(weight_OI, dtype=dtype)

    def apply(x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, num_inputs).float().contiguous()
        y_TO = torch.empty(len(x_TI), num_outputs)
        failed = run(
            ctypes.byref(panels.as_map()),
            num_outputs,
            num_inputs,
            ctypes.c_void_p(x_TI.data_ptr()),
            len(x_TI),
            torch.get_num_threads(),
            ctypes.c_void_p(y_TO.data_ptr()),
        )
        if failed:
            raise MemoryError("a product found no memory")
        return y_TO.reshape(*x.shape[:-1], num_outputs)

    return apply
