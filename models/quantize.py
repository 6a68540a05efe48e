"""Precision of a member: a packed copy of its weights that runs in place of the slices.

    fp32 bf16 fp16   contiguous copies in that dtype: a narrow member reads no strided columns
    int8             8-bit weights, one scale a row, and 8-bit activations, one scale a token

The copy is an `ElasticLM` that shares the source's embedding, so that any granularity runs in it and a
draft made of it still reads and writes the target's key/value store, in the store's dtype. Prefixes are
packed when they are first used, each once.

Activations are scaled token by token, never over the whole input (torch's own `linear_dynamic` takes one
range for all rows): a token's result does not depend on its companions, as a target's must not. The
products are oneDNN's on plain int8 tensors; the `quantized` dtypes of torch, some of whose kernels are
faster, are on their way out (https://github.com/pytorch/pytorch/issues/184982).
"""

import copy
from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic import ElasticLM
from models.errors import UsageError
from models.granularity import FULL, Granularity
from models.layers import RMSNorm
from models.probe import DTYPES

INT8 = "int8"
PRECISIONS = (*DTYPES, INT8)
TINY = 1e-30

Kernel: TypeAlias = Callable[[Tensor], Tensor]


def split_precision(text: str) -> tuple[str, str | None]:
    """A granularity or folder, and the precision behind its last `@`, if there is one.

    Raises:
        UsageError: if what follows `@` is no precision.

    >>> split_precision("ffn=0.25@int8"), split_precision("S")
    (('ffn=0.25', 'int8'), ('S', None))
    """
    name, at, precision = text.rpartition("@")
    if not at:
        return text, None
    if precision not in PRECISIONS:
        raise UsageError(f"{text}: {precision!r} is no precision; choose from {', '.join(PRECISIONS)}")
    return name, precision


def pack(model: ElasticLM, precision: str, granularity: Granularity = FULL) -> ElasticLM:
    """A copy of the model that runs in another precision, with the weights of one member packed.

    It shares the source's embedding and keeps its weights by name, so it can be saved and cut like the
    source. Where nothing says otherwise it computes in fp32 (int8) or in the dtype itself.

    Args:
        model: the source, packed or not.
        precision: one of `PRECISIONS`.
        granularity: the member that is packed now; others are as they are used.

    Raises:
        UsageError: if this device or processor has no kernels for it, or the member does not fit.
    """
    weight = model.model.embed_tokens.weight
    if precision == INT8:
        _check_int8(weight.device)
    dtype = DTYPES.get(precision, torch.float32)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)  # the modules are copied, the tensors are the source's
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, precision))
            elif isinstance(child, RMSNorm):
                child.weight = nn.Parameter(child.weight.detach().to(dtype), requires_grad=False)
    with torch.inference_mode():
        packed(torch.zeros(1, 1, dtype=torch.long, device=weight.device), granularity)
    return packed


def packed_bytes(model: ElasticLM) -> int:
    """Bytes of the packed weights so far, which come on top of the source's."""
    return sum(module.num_bytes for module in model.modules() if isinstance(module, PackedLinear))


class PackedLinear(nn.Linear):
    """A linear map whose prefixes are packed copies of the source's weight."""

    def __init__(self, source: nn.Linear, precision: str) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        self.weight = source.weight  # the very tensors, under the same names
        self.register_parameter("bias", source.bias)
        self.precision = precision
        self.num_bytes = 0
        self._kernels: dict[tuple[int, int], Kernel] = {}

    def prefix(self, x: Tensor, *, rows: int, columns: int) -> Tensor:
        """See `NestedMap`."""
        kernel = self._kernels.get((rows, columns))
        if kernel is None:
            kernel = self._kernels[rows, columns] = self._pack(rows, columns)
        return kernel(x)

    def forward(self, x: Tensor) -> Tensor:
        """The whole map, as the vocabulary's head uses it; logits come in the wider of both dtypes."""
        y = self.prefix(x, rows=self.out_features, columns=self.in_features)
        return y.to(torch.promote_types(y.dtype, self.weight.dtype))

    def _pack(self, rows: int, columns: int) -> Kernel:
        weight_OI = self.weight.detach()[:rows, :columns]
        bias: Tensor | None = self.bias  # which torch's stubs say is always there
        bias_O = None if bias is None else bias.detach()[:rows]
        if self.precision == INT8:
            self.num_bytes += rows * (columns + 4)  # a byte a weight, four a scale
            return _int8_kernel(weight_OI, bias_O)
        dtype = DTYPES[self.precision]
        # Not `contiguous`: a copy even where nothing changes, so that the bytes told are true.
        copy_OI = weight_OI.to(dtype).clone(memory_format=torch.contiguous_format)
        cast_O = None if bias_O is None else bias_O.to(dtype)
        self.num_bytes += copy_OI.nbytes
        return lambda x: F.linear(x, copy_OI, cast_O)


def _int8_kernel(weight_OI: Tensor, bias_O: Tensor | None) -> Kernel:
    scale_O = (weight_OI.float().abs().amax(1) / 127).clamp_min(TINY)
    codes_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes_OI, [1, codes_OI.shape[1]])
    zero_O = torch.zeros(len(scale_O), dtype=torch.long)
    bias_O = None if bias_O is None else bias_O.float()
    product = torch.ops.onednn.qlinear_pointwise.default
    # Without VNNI products are added in pairs in 16 bits: one bit less keeps them from overflowing.
    levels = 127 if torch.cpu._is_vnni_supported() else 63
    middle, step_O = torch.tensor(128.5), scale_O / levels

    def apply(x: Tensor) -> Tensor:
        size_1 = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True).clamp_min_(TINY)
        # Unsigned codes around 128: those with a sign have no fast kernel. The cast rounds down.
        codes = torch.addcmul(middle, x, levels / size_1).to(torch.uint8)
        y = product(codes, 1.0, 128, packed, step_O, zero_O, None, 1.0, 0, torch.float32, "none", [], "")
        y = cast(Tensor, y).mul_(size_1)
        return y if bias_O is None else y.add_(bias_O)

    return apply


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu":
        raise UsageError(f"int8 runs on a CPU, and the model is on {device}; choose bf16")
    if not torch.backends.mkldnn.is_available():
        raise UsageError("int8: torch has no kernels for it on this processor; choose bf16 or fp32")
