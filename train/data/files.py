"""Documents from local files: .txt, .jsonl, .parquet; one file, a folder of them, or a glob.

Text and JSON lines are read line by line here. `datasets` has builders for both, but its text builder
knows no separator, and its JSON builder refuses a file in which a field first appears after some
megabytes; besides, our own error can name the line. Parquet goes through `datasets`.
"""

import functools
import glob
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from models.base.errors import NestlingError, UsageError
from train.data.documents import checked_text, require_field
from train.data.hub import stream_parquet

COMPRESSIONS = (".xz", ".gz")
UNREADABLE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
"""Errors of broken files; bad UTF-8 and Arrow's errors are ValueErrors."""


@dataclass(frozen=True, kw_only=True)
class LocalFiles:
    """Files of one or several kinds.

    Args:
        source: as the user gave it.
        paths: the files, in the order in which they are read.
        text_field: the field of .jsonl and .parquet that holds the text.
        separator: the line that separates documents in .txt.
        cache_dir: a folder for what `datasets` writes.
        num_skipped: always 0: a file that cannot be read is an error.
    """

    source: str
    paths: tuple[Path, ...]
    text_field: str
    separator: str
    cache_dir: Path | None
    num_skipped: int = 0

    @property
    def licence(self) -> str:
        """Unknown to us."""
        return "not stated (local files)"

    @property
    def num_bytes(self) -> int | None:
        """Size of the files, unless they are packed."""
        is_plain = all(path.suffix in (".txt", ".jsonl") for path in self.paths)
        return sum(path.stat().st_size for path in self.paths) if is_plain else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files' bytes and of how they are read, not of their names."""
        digest = hashlib.sha256(repr((self.text_field, self.separator)).encode())
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256")
            except OSError as error:
                raise unreadable(path, error) from error
            digest.update(kind_of(path).encode() + content.digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Documents of all the files, blank ones left out.

        Raises:
            UsageError: if the text field is missing or holds no text.
            NestlingError: naming the file that cannot be read.
        """
        for path in self.paths:
            try:
                yield from (text for text in READERS[kind_of(path)](path, self) if text.strip())
            except NestlingError:
                raise
            except UNREADABLE as error:
                raise unreadable(path, error) from error


def find_files(
    source: str, *, text_field: str, separator: str, cache_dir: Path | None, key: str
) -> LocalFiles:
    """Find the files that a path, folder or glob names, sorted.

    Raises:
        UsageError: if nothing is there, or nothing of a kind that can be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        paths = sorted(found for found in path.rglob("*") if kind_of(found) and found.is_file())
    elif path.exists():
        paths = [path]
    else:
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute too
        if not paths:
            raise UsageError(
                f"{key}={source!r}: no such file or folder; give stdlib, a path, a glob, or "
                "owner/name of a dataset on the Hugging Face hub"
            )
    unknown = [path for path in paths if not kind_of(path)]
    if unknown or not paths:
        culprit = f"{unknown[0].name} is" if unknown else "the folder holds"
        raise UsageError(
            f"{key}={source!r}: {culprit} nothing that can be read; "
            "give .txt or .jsonl (also as .xz or .gz) or .parquet"
        )
    return LocalFiles(
        source=source, paths=tuple(paths), text_field=text_field, separator=separator, cache_dir=cache_dir
    )


def kind_of(path: Path) -> str:
    """The kind of a file by its name, or "" for one that cannot be read.

    >>> kind_of(Path("a.txt.xz")), kind_of(Path("b.jsonl")), kind_of(Path("c.parquet.gz"))
    ('.txt', '.jsonl', '')
    """
    if path.suffix not in COMPRESSIONS:
        return path.suffix if path.suffix in READERS else ""
    inner = Path(path.stem).suffix
    return inner if inner in (".txt", ".jsonl") else ""


def unreadable(path: Path, error: BaseException) -> NestlingError:
    """One line on why a file cannot be read."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = " ".join(text.split()) or type(error).__name__
    return NestlingError(f"{path}: cannot be read ({reason}); repair the file or leave it out")


def open_text(path: Path) -> IO[str]:
    """Open for reading as UTF-8, unpacking on the way; line ends stay as they are."""
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def read_txt(path: Path, files: LocalFiles) -> Iterator[str]:
    """Documents between separator lines; the line end before a separator belongs to it."""
    lines: list[str] = []
    with open_text(path) as file:
        for line in file:
            if line.rstrip("\r\n") == files.separator:
                yield "".join(lines).removesuffix("\n").removesuffix("\r")
                lines = []
            else:
                lines.append(line)
    yield "".join(lines)


def read_jsonl(path: Path, files: LocalFiles) -> Iterator[str]:
    """The text field of each line; a null is no document."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number},"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise NestlingError(f"{where} is not JSON ({error.msg}); repair the line") from None
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise NestlingError(f"{where} is a {kind}, not an object; give one object a line")
            require_field(record, files.text_field, where)
            if record[files.text_field] is not None:
                yield checked_text(record[files.text_field], files.text_field, where)


def read_parquet(path: Path, files: LocalFiles) -> Iterator[str]:
    """The text column, streamed by `datasets`; a null is no document."""
    table = stream_parquet(path, files.cache_dir)
    require_field(table.column_names or (), files.text_field, str(path))
    for batch in table.select_columns([files.text_field]).iter(batch_size=256):
        for text in batch[files.text_field]:
            if text is not None:
                yield checked_text(text, files.text_field, str(path))


READERS: dict[str, Callable[[Path, LocalFiles], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
