"""Odd paths: devices and pipes, and names that are not UTF-8."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


def is_stream(path: Path) -> bool:
    """Return True for a device, a pipe, a socket or an open file of a process.

    >>> is_stream(Path("/dev/null")), is_stream(Path("/dev/stdout")), is_stream(Path("results.json"))
    (True, True, False)
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        return True
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return False
        folder = path.parent.resolve()
        if folder.name == "fd" and folder.is_relative_to("/proc"):
            return True
        path = path.parent / path.readlink()
    return False


def is_url(text: str) -> bool:
    """Return whether a text names a server.

    >>> is_url("http://localhost:8000/v1"), is_url("checkpoints/demo/model")
    (True, False)
    """
    return text.startswith(("http://", "https://"))


_MOST_LINKS = 40
"""Links that the system follows: https://man7.org/linux/man-pages/man7/path_resolution.7.html"""


@contextlib.contextmanager
def utf8_path(path: str | Path) -> Iterator[Path]:
    """Yield a path that libraries in Rust take: the same, or a link to it if it is not UTF-8."""
    path = Path(path)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "link"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def shown(path: str | Path) -> str:
    """Return a path as text that can be shown; bytes that are not UTF-8 become question marks."""
    return str(path).encode("utf-8", errors="replace").decode()
