"""The default corpus: the source of the Python standard library on the user's own disk.

About 10 MB of real text that every machine has, so a first run needs no network and no download.
Left out: test suites (more than the library itself, and repetitive), tables that a program wrote
(encodings, pydoc_data), installed packages, and files that describe this one machine.
"""

import functools
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.base.errors import NestlingError
from train.data.documents import hash_documents

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "__phello__"}
    | {"test", "tests", "idle_test", "encodings", "pydoc_data"}
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True, kw_only=True)
class StandardLibrary:
    """One document a file, in a fixed order: a folder's files by name, then its folders by name.

    Args:
        texts: the files.
        num_skipped: files that are not UTF-8.
        source: always stdlib.
    """

    texts: tuple[str, ...]
    num_skipped: int
    source: str = "stdlib"

    @staticmethod
    def on_this_disk(root: Path | None = None) -> "StandardLibrary":
        """Read the library that this Python runs on, or the one at `root`.

        Raises:
            NestlingError: if there is none, as in a Python that keeps its library in an archive.
        """
        root = root or Path(sysconfig.get_path("stdlib"))
        texts, num_skipped = [], 0
        for path in source_files(root):
            try:
                text = path.read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                num_skipped += 1
                continue
            if text.strip():
                texts.append(text)
        if not texts:
            raise NestlingError(f"data.source='stdlib': no Python source at {root}; give files of your own")
        return StandardLibrary(texts=tuple(texts), num_skipped=num_skipped)

    @property
    def licence(self) -> str:
        """Python's own."""
        return f"PSF-2.0 (Python Software Foundation), Python {platform.python_version()}"

    @property
    def num_bytes(self) -> int:
        """Size of the text."""
        return sum(len(text.encode()) for text in self.texts)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files' text; it differs from one Python release to the next."""
        return hash_documents(self.texts)

    def documents(self) -> Iterator[str]:
        """Yield the text of each file."""
        return iter(self.texts)


def source_files(root: Path) -> Iterator[Path]:
    """Yield Python files in a fixed order; folders that are left out are not even listed."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_skipped(name))
        yield from (
            Path(folder, name) for name in sorted(names) if name.endswith(".py") and not is_skipped(name)
        )


def is_skipped(name: str) -> bool:
    """Return whether a file or folder of this name is left out.

    >>> is_skipped("test"), is_skipped("json"), is_skipped("_sysconfigdata__linux_.py")
    (True, False, True)
    """
    return name in SKIPPED_FOLDERS or name.startswith(SKIPPED_PREFIXES)
