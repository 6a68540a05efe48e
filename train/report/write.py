"""A text file that is whole or absent."""

import os
import secrets
from pathlib import Path

from models.errors import UsageError


def write_text(path: Path, text: str) -> Path:
    """Write a text file beside its place, then rename it there; missing folders are made.

    Raises:
        UsageError: if `path` is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the path of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
