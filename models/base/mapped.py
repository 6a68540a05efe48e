"""Memory of tensors that a file is mapped to: given back once they were read, and read again when needed.

What it takes to pack a large model is then little more than what is packed.
"""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_REGIONS = Path("/proc/self/maps")
_DONTNEED, _POPULATE_READ = 4, 22  # Linux's numbers


Regions = Sequence[tuple[int, int]]
"""First and last address of regions of files that are mapped, read-only or private to this process."""


def forget_pages(tensor: Tensor, regions: Regions | None = None) -> None:
    """Give back the memory of a tensor if a file is mapped there, as it is on disk; else do nothing.

    What was changed in memory alone would be lost: this is for weights that nobody writes to.

    Args:
        tensor: any tensor.
        regions: what is mapped, where it is known from before; reading that takes half a millisecond.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    address = tensor.data_ptr()
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and _is_mapped(start, end, file_regions() if regions is None else regions):
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def read_pages(tensor: Tensor) -> None:
    """Bring what a tensor spans into memory at once, where the system can (Linux 5.14).

    Met one by one, the pages of a mapped file take longer to find than to copy.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + (last + 1) * tensor.itemsize
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _POPULATE_READ)


def trim_memory() -> None:
    """Give back memory that was freed in between what is kept, where the C library can (glibc)."""
    if sys.platform.startswith("linux") and hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def file_regions() -> Regions:
    """Return the regions of files that are mapped now; none where the system does not say."""
    try:
        lines = _REGIONS.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    regions = []
    for line in lines:
        span, mode, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0" and mode.endswith("p"):
            first, last = (int(part, 16) for part in span.split("-"))
            regions.append((first, last))
    return regions


def _is_mapped(start: int, end: int, regions: Regions) -> bool:
    """Return whether one region holds all of a range."""
    return any(first <= start and end <= last for first, last in regions)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
