"""Write a report: a text file that is whole or absent, in a folder that is made if it is missing."""

from pathlib import Path

from models.base import files
from models.base.errors import UsageError


def write_text(path: Path, text: str) -> Path:
    """Write a text file; missing folders are made.

    Raises:
        UsageError: if `path` is a folder.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the path of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)
    return path
