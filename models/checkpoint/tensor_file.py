"""Write a safetensors file a tensor at a time: its bytes are those of the library's own writer.

The library takes all tensors at once, so that slices of a larger model are copied before the first is
written, and is slower than a copy of the file. https://github.com/huggingface/safetensors#format
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base.mapped import read_pages

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of dtypes, in the format's order: tensors of the last one come first."""
_ALIGNMENT = 8
CHUNK = 2**20
"""Bytes of a call: more are not faster, and leave the processor's caches."""


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device and layout.

    Raises:
        OSError: if the disk refuses.
    """
    places = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-places.index(tensors[name].dtype), name))
    with path.open("wb", buffering=0) as file:
        header = _header(names, tensors)
        _write(file.fileno(), memoryview(len(header).to_bytes(8, "little") + header))
        for name in names:
            tensor = tensors[name].detach()
            read_pages(tensor)
            flat: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            _write(file.fileno(), memoryview(flat))


def _header(names: list[str], tensors: Mapping[str, Tensor]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        fields[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _write(descriptor: int, content: memoryview) -> None:
    """Write all of it; a call may take a part only."""
    while content:
        content = content[os.write(descriptor, content[:CHUNK]) :]
