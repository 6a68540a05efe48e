"""Memory that a training step frees is kept for the next one.

A step allocates and frees the same large arrays again and again. By default the C library hands them back
to the system, which clears every page before it hands it out again: a tenth of a CPU step's time was measured
(docs/LOG.md), and no difference in the most memory held.
"""

import ctypes
import sys

# https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Keep freed memory until the process ends; return True if the C library can do that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # macOS, Windows, musl
        return False
    largest = 2**31 - 1
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, largest))
