"""Documents from local files: .txt, .jsonl, .json, .parquet; one file, a folder of them, or a glob.

Text and JSON lines are read line by line here. `datasets` has builders for both, but its text builder
knows no separator, and its JSON builder refuses a file in which a field first appears after some
megabytes; besides, our own error can name the line. Parquet goes through `datasets`.
"""

import bz2
import functools
import glob
import gzip
import hashlib
import io
import logging
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from models.base.errors import NestlingError, UsageError
from models.base.files import parse_json
from train.data.documents import Check, checked_text, field_setting, require_field
from train.data.hub import stream_parquet

KINDS = {".txt": ".txt", ".jsonl": ".jsonl", ".ndjson": ".jsonl", ".json": ".json", ".parquet": ".parquet"}
COMPRESSIONS = (".xz", ".gz", ".bz2", ".zst")
MANY_FILES = 50_000
"""A folder of more files than this says that it is being looked through."""
UNREADABLE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)
"""Errors of broken files; bad UTF-8 and Arrow's errors are ValueErrors."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LocalFiles:
    """Files of one or several kinds.

    Args:
        source: as the user gave it.
        paths: the files, in the order in which they are read.
        text_field: the field of .jsonl and .parquet that holds the text.
        separator: the line that separates documents in .txt.
        cache_dir: a folder for what `datasets` writes.
        num_skipped: files of a folder that were left out: hidden ones, and those of other kinds.
        field_setting: name in errors of the setting of the text field.
        check: makes a document of what the field holds.
    """

    source: str
    paths: tuple[Path, ...]
    text_field: str
    separator: str
    cache_dir: Path | None
    num_skipped: int = 0
    field_setting: str = "data.text_field"
    check: Check = checked_text

    @property
    def licence(self) -> str:
        """Unknown to us."""
        return "not stated (local files)"

    @property
    def num_bytes(self) -> int | None:
        """Size of the files, unless they are packed."""
        is_plain = all(path.suffix.lower() in KINDS and kind_of(path) != ".parquet" for path in self.paths)
        return sum(path.stat().st_size for path in self.paths) if is_plain else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the files' bytes and of how they are read, not of their names."""
        read = (self.text_field, self.separator)
        digest = hashlib.sha256(repr(read if self.check is checked_text else (*read, "messages")).encode())
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256")
            except OSError as error:
                raise unreadable(path, error) from error
            digest.update(kind_of(path).encode() + content.digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents of all the files, blank ones left out.

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
    source: str,
    *,
    text_field: str,
    separator: str,
    cache_dir: Path | None,
    key: str,
    check: Check = checked_text,
) -> LocalFiles:
    """Find the files that a path, folder or glob names, sorted.

    Raises:
        UsageError: if nothing is there, or nothing of a kind that can be read.
    """
    if not source.strip():
        raise UsageError(f"{key}={source!r} is empty; give stdlib, a path, a glob or the name of a dataset")
    path, num_skipped = Path(source).expanduser(), 0
    if path.is_dir():
        paths, num_skipped = files_below(path, key)
    elif path.exists():
        paths = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - absolute too
        paths = sorted(one for one in found if not one.is_dir())
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
            "give .txt, .jsonl or .json (also as .gz, .xz, .bz2 or .zst) or .parquet"
        )
    return LocalFiles(
        source=source,
        paths=tuple(paths),
        text_field=text_field,
        separator=separator,
        cache_dir=cache_dir,
        num_skipped=num_skipped,
        field_setting=field_setting(key, messages=check is not checked_text),
        check=check,
    )


def files_below(folder: Path, key: str = "data.source") -> tuple[list[Path], int]:
    """Find the files below a folder that can be read, sorted, and count those that are left out.

    As in Hugging Face datasets, hidden files and folders are left out (`._a.jsonl`, `.ipynb_checkpoints`,
    `__MACOSX`), and linked folders are entered; here each of them once, so that a circle ends. A folder so
    large that this takes long (a home, a root) says so, under the name `key`.
    """
    found: list[Path] = []
    num_skipped, entered, told = 0, set(), MANY_FILES
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(root))
        inside = Path(root).relative_to(folder).parts
        is_hidden = any(part.startswith((".", "__")) for part in inside)
        folders.sort()
        if len(found) + num_skipped >= told:
            logger.warning(
                "%s=%s: %d files looked at so far, %d of them text; give the folder of the data alone",
                key,
                folder,
                len(found) + num_skipped,
                len(found),
            )
            told *= 4
        for name in names:
            path = Path(root, name)
            if is_hidden or name.startswith(".") or not kind_of(path) or not path.is_file():
                num_skipped += 1
            else:
                found.append(path)
    return sorted(found), num_skipped


def kind_of(path: Path) -> str:
    """Return the kind of a file by its name, or "" for one that cannot be read.

    >>> kind_of(Path("a.TXT.xz")), kind_of(Path("b.json.gz")), kind_of(Path("c.parquet.gz"))
    ('.txt', '.json', '')
    """
    if path.suffix.lower() not in COMPRESSIONS:
        return KINDS.get(path.suffix.lower(), "")
    inner = KINDS.get(Path(path.stem).suffix.lower(), "")
    return "" if inner == ".parquet" else inner


def unreadable(path: Path, error: BaseException) -> NestlingError:
    """Return one line on why a file cannot be read."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    reason = " ".join(text.split()) or type(error).__name__
    return NestlingError(f"{path}: cannot be read ({reason}); repair the file or leave it out")


def open_text(path: Path) -> IO[str]:
    """Open for reading as UTF-8, unpacking on the way; line ends stay as they are, a byte order mark goes."""
    unpack: Any = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": _open_zst}
    if path.suffix.lower() in COMPRESSIONS:
        packed = unpack[path.suffix.lower()](path, "rb")
        return io.TextIOWrapper(packed, encoding="utf-8-sig", newline="\n")
    return path.open(encoding="utf-8-sig", newline="\n")


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    import pyarrow as pa  # type: ignore[import-untyped]

    return cast("IO[bytes]", pa.CompressedInputStream(path.open(mode), "zstd"))


def read_txt(path: Path, files: LocalFiles) -> Iterator[str]:
    """Yield the documents between separator lines; the line end before a separator belongs to it."""
    if files.check is not checked_text:
        raise UsageError(f"{files.field_setting}={files.text_field!r}: {path} has no fields; give .jsonl")
    lines: list[str] = []
    num_inside = 0
    with open_text(path) as file:
        for line in file:
            if line.rstrip("\r\n") == files.separator:
                yield "".join(lines).removesuffix("\n").removesuffix("\r")
                lines = []
            else:
                num_inside += bool(files.separator) and files.separator in line
                lines.append(line)
    yield "".join(lines)
    if num_inside:
        logger.warning(
            "data.separator=%r stands inside %d lines of %s, where it separates nothing; put it on a line "
            "of its own, or set another data.separator",
            files.separator,
            num_inside,
            path,
        )


def read_jsonl(path: Path, files: LocalFiles) -> Iterator[str]:
    """Yield the text field of each line; a null is no document."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number},"
                yield from _text_of(_parsed(line, where, "repair the line"), files, where)


def read_json_file(path: Path, files: LocalFiles) -> Iterator[str]:
    """Yield the text field of each object of a list, or of the `results` that `--json` wrote.

    A file that begins otherwise is JSON lines.
    """
    with open_text(path) as file:
        start = next((line for line in file if line.strip()), "")
        is_results = start.strip() == "{"
        if not is_results and not start.lstrip().startswith("["):
            yield from read_jsonl(path, files)
            return
        records = _parsed(start + file.read(), f"{path}", "repair it")
    if is_results:
        records = records.get("results")
        if not isinstance(records, list):
            raise NestlingError(f"{path} holds one object without results; give a list, or one object a line")
    for number, record in enumerate(records, 1):
        yield from _text_of(record, files, f"{path}, item {number},")


def _parsed(text: str, where: str, remedy: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise NestlingError(f"{where} is not JSON ({error}); {remedy}") from None


def _text_of(record: Any, files: LocalFiles, where: str) -> Iterator[str]:
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise NestlingError(f"{where} is a {kind}, not an object; give one object a line")
    require_field(record, files.text_field, where, files.field_setting)
    if record[files.text_field] is not None:
        yield files.check(record[files.text_field], files.text_field, where, files.field_setting)


def read_parquet(path: Path, files: LocalFiles) -> Iterator[str]:
    """Yield the text column, streamed by `datasets`; a null is no document."""
    table = stream_parquet(path, files.cache_dir)
    require_field(table.column_names or (), files.text_field, str(path), files.field_setting)
    for batch in table.select_columns([files.text_field]).iter(batch_size=256):
        for text in batch[files.text_field]:
            if text is not None:
                yield files.check(text, files.text_field, str(path), files.field_setting)


READERS: dict[str, Callable[[Path, LocalFiles], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".json": read_json_file,
    ".parquet": read_parquet,
}
