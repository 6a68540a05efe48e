"""The message of a command that fails: one line on stderr, and a file with the traceback of a defect."""

import contextlib
import errno
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from models.base.files import write_text

REMEDIES = {
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.EFBIG: "raise the limit of a file's size, or choose another place",
    errno.EROFS: "choose another place",
    errno.EACCES: "check its permissions, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link, or choose another place",
}
"""What to do about an error of the operating system."""


class Terminated(BaseException):
    """A SIGTERM came; as KeyboardInterrupt, it is no error that a command handles."""


def fail(message: str, code: int) -> int:
    """Print the message, and return the exit code."""
    for line in message.splitlines():
        print(f"nestling: error: {line}", file=sys.stderr)
    return code


@contextlib.contextmanager
def unwinding_when_terminated() -> Iterator[None]:
    """Raise Terminated in the block at a SIGTERM, so that what is half-written goes, as with Ctrl-C.

    Training and servers have handlers of their own inside it.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def describe_environment(error: BaseException) -> str | None:
    """Return one line for what the machine refuses; None for a defect of ours."""
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        remedy = REMEDIES.get(error.errno or 0)
        return _one_line(f"{text}; {remedy}" if remedy else text)
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text:
        return f"out of memory ({_one_line(text)[:100]}); choose a smaller model, batch or context"
    return None


def describe_defect(error: BaseException, arguments: Sequence[str]) -> str:
    """Name a defect of ours in one line, and write its traceback to a file that the line names."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    name = f"{type(error).__name__} at {where}: {_one_line(str(error))[:200]}"
    return (
        f"this is a defect of nestling ({name}); please report it with {_write_traceback(error, arguments)}"
    )


def replace_what_cannot_be_encoded() -> None:
    """Let stdout and stderr show "?" for a character that their encoding lacks, and take text if closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in `nestling machine >&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _write_traceback(error: BaseException, arguments: Sequence[str]) -> str:
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="nestling-", suffix=".txt")
        os.close(descriptor)
        write_text(path, f"nestling {' '.join(arguments)}\n\n{text}")
        return f"the traceback in {path}"
    print(text, file=sys.stderr)
    return "the traceback above"


def _one_line(text: str) -> str:
    return " ".join(text.split())
