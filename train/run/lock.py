"""One run at a time in a run folder: the system's lock on the folder, which ends with the process."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from models.base.errors import UsageError


class RunLock:
    """The lock of a run folder, released at the end of the block.

    Args:
        out: the run folder; it need not exist yet.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def take(self) -> None:
        """Lock the folder if it exists, without waiting; do nothing if that is done.

        Some network file systems lock no folders: there two runs are not kept apart.

        Raises:
            UsageError: if another run has it.
        """
        if self._descriptor is not None or not self.out.is_dir():
            return
        descriptor = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"--out {self.out}: another run is writing to this folder; wait for its end, "
                "or choose another --out"
            ) from None
        except OSError:
            os.close(descriptor)
            return
        self._descriptor = descriptor
