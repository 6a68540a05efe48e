"""Writing that is whole or absent: a folder or a JSON file appears complete, or not at all.

A folder is written beside its final place, forced to disk, then renamed: a reader never meets half
of it, and a run that dies leaves only a hidden `.name.*.partial`, or what it was about to replace under
`.name.*.replaced`; `sweep` removes the one and puts back the other. A device or a pipe is written to, a link
is followed.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError, UsageError
from models.base.numbers import size
from models.base.outputs import check_link
from models.base.paths import is_stream

LOCK = ".lock"
"""Name of the lock of a folder that several processes fill: it makes the folder nobody's."""


@contextlib.contextmanager
def write_folder(path: str | Path, *, marker: str = "nestling.json") -> Iterator[Path]:
    """Fill a temporary folder that becomes `path` when the block ends, and vanishes if it raises.

    Args:
        path: the final name; missing parents are made. What stands there is replaced only if it is
            an empty folder, or one that holds `marker`, that is, one that we wrote.
        marker: the file by which such a folder is known; the block writes it.

    Raises:
        UsageError: if something else stands at `path`.
        NestlingError: if the disk refuses: no space, no permission.
    """
    check_replaceable(path, marker=marker)
    final = Path(os.path.realpath(path))  # a link keeps pointing to where its owner wanted the bytes
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        with _naming_refusal(path):
            make_folder(final.parent)
            partial.mkdir()
            with _held(partial):
                yield partial
            assert (partial / marker).is_file(), f"{partial} lacks {marker}: it could not be replaced later"
            _sync_tree(partial)
            _publish(partial, final)
    except NestlingError as error:
        error.args = (str(error).replace(str(partial), str(path)),)  # what a user finds is named
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(path: str | Path, *, marker: str = "nestling.json") -> None:
    """Say early whether `write_folder` would refuse `path`.

    Raises:
        UsageError: if `path` is neither free, nor an empty folder, nor one that holds `marker`.
    """
    path = Path(path)
    check_link("", path)
    if path.is_dir():
        ours = (inside.name == LOCK or _is_left_over(inside) for inside in path.iterdir())
        if not all(ours) and not (path / marker).is_file():
            raise UsageError(
                f"{path} exists and is not ours to replace (no {marker} in it); "
                "choose another place or empty it"
            )
    elif path.exists():
        raise UsageError(f"{path} exists and is not a folder; choose another place")
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise UsageError(f"{path} cannot be: {ancestor} is not a folder; choose another place")


def check_room(path: str | Path, num_bytes: int) -> None:
    """Raise NestlingError if the disk of `path` has less room than that."""
    place = next(one for one in (Path(path), *Path(path).absolute().parents) if one.exists())
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise NestlingError(
            f"{path} needs {size(num_bytes)}, and {size(free)} are free there; "
            "make room, or choose another place"
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all. NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    r"""Write a text file, whole or not at all; its folder must exist.

    A byte of a path that is not UTF-8 becomes an escape such as `\udce9`, from which JSON and YAML read the
    same path back.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def hash_files(*paths: Path) -> str:
    """Return the SHA-256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder must exist."""
    try:
        with _beside(Path(path)) as partial:
            partial.write_bytes(content)
    except OSError as error:
        error.filename = os.fspath(path)  # not the temporary file's, nor none as when a disk is full
        raise


@contextlib.contextmanager
def write_file(path: str | Path) -> Iterator[Path]:
    """Fill a temporary file that becomes `path` when the block ends, and vanishes if it raises.

    Missing parents are made; a file that stands at `path` is replaced.

    Raises:
        NestlingError: if the disk refuses: no space, no permission.
    """
    path = Path(path)
    with _naming_refusal(path):
        if not is_stream(path):
            make_folder(Path(os.path.realpath(path)).parent)
        with _beside(path) as partial:
            partial.touch()
            with _held(partial):
                yield partial


def clear_interrupted(path: Path) -> None:
    """Clear away what writers of `path` that were killed have left beside it; those that live hold a lock.

    What one was about to replace is put back, unless its successor stands there.
    """
    final = Path(os.path.realpath(path))
    for left in filter(_is_left_over, final.parent.glob(f".{glob.escape(final.name[:50])}*")):
        if left.name[1:].rsplit(".", 2)[0] not in (final.name, final.name[:50]):
            continue
        try:
            with _held(left):
                if left.suffix == ".replaced" and not final.exists():
                    left.rename(final)
                else:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError:  # held, or not ours to remove
            continue


@contextlib.contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Hold a lock on what is being written, which ends with this process.

    Raises:
        OSError: if another process holds it.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "content"
            _write_stream(path, (Path(folder) / "content").read_bytes())
        return
    _refuse_circle(path)
    path = Path(os.path.realpath(path))  # a link keeps pointing to where its owner wanted the bytes
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write_stream(path: Path, content: bytes) -> None:
    try:
        # A blocking open would wait for the reader of a pipe; what an open file holds already stays.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            stream.write(content)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EPIPE):
            raise
        raise NestlingError(f"cannot write {path}: nobody reads it; keep its reader running") from error


def _refuse_circle(path: Path) -> None:
    """Raise the system's OSError for a link that leads back to itself; one that leads nowhere yet is good."""
    with contextlib.suppress(FileNotFoundError):
        path.stat()


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, their names forced to disk; one that is there stays."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder at once: whoever dies in the middle leaves a `.partial`, never half of `path`."""
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/nestling`, or `~/.cache/nestling`.

    Raises:
        NestlingError: if this user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nestling"
    except RuntimeError:
        raise NestlingError("this user has no home folder; set XDG_CACHE_HOME to a folder") from None


def sweep(folder: Path) -> None:
    """Clear away what killed writers left in a folder that nobody else writes to now."""
    for path in filter(_is_left_over, list(folder.glob(".*"))):
        final = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if path.suffix == ".replaced" and not final.exists():
            path.rename(final)  # killed between the two renames: what stood there is still the best
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or a folder's names to disk.

    Some file systems (vboxsf, OpenAFS, old CIFS) cannot do that to a folder, which costs no file.

    Raises:
        NestlingError: naming the file that cannot be synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _DISK_REFUSES:
            raise
        if error.errno not in _CANNOT_SYNC or not path.is_dir():
            raise NestlingError(f"cannot write {path}: {error.strerror}; choose another place") from error
    finally:
        os.close(descriptor)


def parse_json(text: str) -> Any:
    """Parse JSON; whatever is wrong with it is a ValueError that says so in one line.

    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: nested too deeply
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        NestlingError: if the file is missing, is not JSON, or holds something else than an object.
    """
    path = Path(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise NestlingError(f"{path} is missing; restore it, or write the folder again") from None
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise NestlingError(f"{path} is not JSON ({error}); restore it, or write the folder again") from None
    if not isinstance(value, dict):
        raise NestlingError(
            f"{path} holds a {type(value).__name__}, not an object; restore it, or write the folder again"
        )
    return value


def finite(value: Any) -> Any:
    """Return the value with null where JSON has no number for it: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of an error that the block raises about its content."""
    try:
        yield
    except NestlingError as error:
        raise NestlingError(f"{path}: {error}") from None


@contextlib.contextmanager
def _naming_refusal(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_REFUSES:
            raise
        raise NestlingError(
            f"cannot write {path}: {error.strerror}; make room or give permission, or choose another place"
        ) from error


_DISK_REFUSES = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
}


_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def _is_left_over(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in (".partial", ".replaced")


def _publish(partial: Path, final: Path) -> None:
    """Rename into place; what stood there is put aside first and comes back if the rename fails."""
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.replaced")
    try:
        if final.exists():
            final.rename(aside)
        partial.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
