"""Token streams on disk: .npy files, written piece by piece and read through a memory map."""

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stream = NDArray[np.unsignedinteger[Any]]
StreamType = type[np.uint16] | type[np.uint32] | type[np.bool_]


def stream_dtype(vocab_size: int) -> StreamType:
    """Return the smallest type that holds every id.

    >>> stream_dtype(50_257), stream_dtype(151_936)
    (<class 'numpy.uint16'>, <class 'numpy.uint32'>)
    """
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class StreamWriter:
    """Appends to a .npy file whose length is known only at the end.

    NumPy pads the header so that the first dimension can grow in place.
    """

    def __init__(self, path: Path, dtype: StreamType, eos: int) -> None:
        self.dtype = dtype
        self.num_tokens = 0
        self.file = path.open("wb")
        self.header_bytes = self._write_header()
        self.write(np.array([eos], dtype))

    def write(self, ids: NDArray[Any]) -> None:
        """Append tokens."""
        self.file.write(ids.tobytes())
        self.num_tokens += len(ids)

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.file.seek(0)
        grown = self._write_header()
        self.file.close()
        assert grown == self.header_bytes, (grown, self.header_bytes)

    def _write_header(self) -> int:
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        header = {"descr": descr, "fortran_order": False, "shape": (self.num_tokens,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()
