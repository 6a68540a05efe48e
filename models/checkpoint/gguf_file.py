"""The reader of the package `gguf`, bounded, whose errors name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from models.base.errors import NestlingError, UsageError, is_panic


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Name the file in any error that the block raises over what it holds.

    A flipped bit may meet the reader, NumPy or the library `tokenizers`, each with errors of its own kinds.
    """
    try:
        with np.errstate(over="raise"):
            yield
    except (NestlingError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NestlingError(f"{path} is damaged, or no GGUF file ({reason}); fetch it again") from None


def open_gguf(path: Path) -> Any:
    """Return a reader of the file.

    Raises:
        UsageError: if there is no file.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a GGUF file or a model folder")
    return _reader_class()(path, "c")  # mapped; torch asks for memory that can be written


@cache
def _reader_class() -> Any:
    import gguf

    class Reader(gguf.GGUFReader):
        """A reader that stops at the end of the file; the library's counts on, without end or bound."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it ends before byte {int(offset)} of what it announces")
            # Parts of a mapped array are mapped arrays, and to make one takes ten times as long.
            part = self.data.view(np.ndarray)[int(offset) : end].view(dtype)
            return part.view(part.dtype.newbyteorder(override_order or self.byte_order))

    return Reader
