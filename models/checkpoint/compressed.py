"""int8 and int4 folders in the format compressed-tensors, which transformers, vLLM and SGLang open.

    int8   a scale for each row of a matrix
    int4   a scale for every 32 numbers of a row

Of the matrices in layers `weight` becomes `weight_packed` (codes, the lowest bits of an int32 first),
`weight_scale` and `weight_shape`; all else stays as it is. https://github.com/vllm-project/compressed-tensors

O outputs, I inputs, G groups of inputs.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.checkpoint.layout import Layout
from models.checkpoint.weights import HEAD
from models.kernels.codes import quantize

BITS = {"int8": 8, "int4": 4}
GROUP = 32
KEY = "quantization_config"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


def compress(layout: Layout, dtype: str) -> Layout:
    """Return a layout whose matrices are in `dtype`, a key of `BITS`.

    Raises:
        UsageError: if a width is no multiple of 32.
    """
    bits, stored = BITS[dtype], dict[str, Tensor]()
    for name, tensor in layout.tensors.items():
        if not _is_packed(name, tensor):
            stored[name] = tensor
            continue
        if tensor.shape[1] % GROUP:
            raise UsageError(
                f"--dtype {dtype} packs {GROUP} numbers at a time, and {name} is {list(tensor.shape)}; "
                "choose a granularity whose widths are multiples of 32"
            )
        codes_OI, scale_OG = _codes(tensor, bits)
        base = name.removesuffix("weight")
        stored[base + PACKED] = pack_codes(codes_OI, bits)
        stored[base + SCALE] = scale_OG
        stored[base + SHAPE] = torch.tensor(tensor.shape)
    return dataclasses.replace(layout, fields={**layout.fields, KEY: _settings(bits)}, packed=stored)


def count_compressed_bytes(layout: Layout, dtype: str, weight_bytes: int) -> int:
    """Return the bytes of the tensors that `compress` gives, without making them.

    Args:
        layout: the member.
        dtype: a key of `BITS`.
        weight_bytes: bytes of a number that is not packed.
    """
    total = 0
    for name, tensor in layout.tensors.items():
        if not _is_packed(name, tensor):
            total += tensor.numel() * weight_bytes
            continue
        rows, columns = tensor.shape
        scales = rows if BITS[dtype] == 8 else rows * columns // GROUP
        total += rows * columns * BITS[dtype] // 8 + scales * weight_bytes + 16  # the shape has two int64
    return total


def check_installed() -> None:
    """Raise UsageError if transformers could not open such a folder here."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UsageError(
            "int8 and int4 folders are proved in transformers, which needs the package compressed-tensors; "
            "pip install 'nestling[compressed]'"
        )


def uncompressed_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what says how matrices are packed, if it is a way that we read."""
    return {name: value for name, value in fields.items() if name != KEY or _bits(fields) is None}


def decompress(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a folder, those that are packed in fp32.

    Raises:
        NestlingError: if a part of a packed matrix is missing or of another shape.
    """
    bits = _bits(fields)
    if bits is None:
        return dict(tensors)
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((PACKED, SCALE, SHAPE))}
    for name in tensors:
        base = name.removesuffix(PACKED)
        if base != name:
            found[f"{base}weight"] = _decompress(tensors, base, bits)
    return found


def _decompress(tensors: Mapping[str, Tensor], base: str, bits: int) -> Tensor:
    try:
        codes_OI, scale_OG = unpack_codes(tensors[base + PACKED], bits), tensors[base + SCALE].float()
        rows, columns = tensors[base + SHAPE].tolist()
        codes_OI = codes_OI[:rows, :columns].float()
        weight_OI: Tensor = (codes_OI.unflatten(1, (scale_OG.shape[1], -1)) * scale_OG[..., None]).flatten(1)
        return weight_OI
    except (KeyError, ValueError, IndexError, RuntimeError, TypeError):
        parts = ", ".join((PACKED, SCALE, SHAPE))
        raise NestlingError(
            f"{base.removesuffix('.')} lacks one of {parts}, or they do not fit; write the folder again"
        ) from None


def _is_packed(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name != HEAD and name.startswith("model.layers.")


def _codes(weight_OI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes, and scales in the weight's own dtype, with which they were rounded."""
    groups = 1 if bits == 8 else weight_OI.shape[1] // GROUP
    weight_OGY = weight_OI.float().unflatten(1, (groups, -1))
    scale_OG1 = quantize(weight_OGY, bits)[1].to(weight_OI.dtype)
    scale_OG1 = scale_OG1.clamp_min(torch.finfo(weight_OI.dtype).tiny)
    most = (1 << (bits - 1)) - 1
    codes_OGY = (weight_OGY / scale_OG1.float()).round().clamp_(-most, most)
    return codes_OGY.flatten(1).to(torch.int8), scale_OG1[..., 0]


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Return codes as int32, as many in each as fit, offset so that none is negative.

    >>> pack_codes(torch.tensor([[-8, -7, 7, 0, 0, 0, 0, -8]]), 4)
    tensor([[143167248]], dtype=torch.int32)
    """
    count = 32 // bits
    words_OWC = codes_OI.to(torch.int64).add_(1 << (bits - 1)).unflatten(1, (-1, count))
    words_OW = (words_OWC << (torch.arange(count) * bits)).sum(-1)
    signed_OW: Tensor = words_OW.where(words_OW < 2**31, words_OW - 2**32)
    return signed_OW.to(torch.int32)


def unpack_codes(words_OW: Tensor, bits: int) -> Tensor:
    """Return the codes of `pack_codes`.

    >>> unpack_codes(torch.tensor([[143167248]], dtype=torch.int32), 4)
    tensor([[-8, -7,  7,  0,  0,  0,  0, -8]])
    """
    shifts_C = torch.arange(32 // bits) * bits
    codes_OWC: Tensor = (words_OW[..., None].to(torch.int64) >> shifts_C) & ((1 << bits) - 1)
    return codes_OWC.sub_(1 << (bits - 1)).flatten(1)


def _settings(bits: int) -> dict[str, Any]:
    group = {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": GROUP}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def _bits(fields: Mapping[str, Any]) -> int | None:
    """Return the bits of a config.json's matrices; None if it says nothing, or not what we write."""
    stated = fields.get(KEY)
    return next((bits for bits in BITS.values() if stated == _settings(bits)), None)
