"""Checks of the places that a command writes to, made before the work and not after it."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from models.base.errors import UsageError
from models.base.paths import is_stream


def check_output(flag: str, path: Path) -> None:
    """Say before the work, not after it, that a file could not be written.

    Raises:
        UsageError: naming the flag, the path and the reason.
    """
    check_link(flag, path)
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give the path of a file")
    place = path.parent
    if is_stream(path):
        place = path
        _check_reader(flag, path)
    elif path.is_symlink():
        place = Path(os.path.realpath(path)).parent
    if not place.exists():
        raise UsageError(f"{flag} {path}: the folder {place} does not exist; make it first")
    if not os.access(place, os.W_OK):
        raise UsageError(f"{flag} {path}: {place} cannot be written to; choose another place")


def check_link(flag: str, path: Path) -> None:
    """Raise UsageError for a path that the system cannot follow: links in a circle, or too long a name."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except OSError as error:
        named = f"{flag} {path}".lstrip()
        raise UsageError(f"{named}: {error.strerror}; choose another place") from None


Paths: TypeAlias = Path | str | Sequence[Path | str] | None


def check_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Paths]) -> None:
    """Refuse an output that would replace what the command reads, or lie in a folder that it reads.

    Args:
        outputs: flag -> path that is written.
        inputs: flag or argument -> what is read; a name that is no path, such as `stdlib`, does no harm.

    Raises:
        UsageError: naming both.
    """
    for flag, out in outputs.items():
        if out is None or is_stream(out):
            continue
        for name, source in _each(inputs):
            if (relation := _relation(out, source)) is not None:
                which = f"{name} itself" if relation == "is" else f"{name} {source}"
                raise UsageError(f"{flag} {out} {relation} {which}; choose another place")


def _each(inputs: Mapping[str, Paths]) -> Iterator[tuple[str, Path]]:
    for name, value in inputs.items():
        for path in [value] if isinstance(value, str | Path) else value or []:
            if path:
                yield name, Path(path)


def _relation(out: Path, source: Path) -> str | None:
    there = Path(os.path.realpath(source))
    # Where it leads, and where it stands: a link inside of a folder is part of the folder.
    stands = os.path.normpath(Path(os.path.realpath(out.parent)) / out.name)
    places = {Path(os.path.realpath(out)), Path(stands)}
    if there in places or (out.exists() and source.exists() and out.samefile(source)):
        return "is"
    if source.is_dir():
        if any(place.is_relative_to(there) for place in places):
            return "lies in"
        if out.is_file() and any(out.samefile(file) for file in source.iterdir() if file.is_file()):
            return "is a file of"
    if source.exists() and any(there.is_relative_to(place) for place in places):
        return "holds"
    return None


def _check_reader(flag: str, path: Path) -> None:
    """Hold a pipe open until the process ends, so that its reader waits for what is written later."""
    mode = path.stat().st_mode
    if stat.S_ISSOCK(mode):
        raise UsageError(f"{flag} {path} is a socket; give a file or a pipe")
    if not stat.S_ISFIFO(mode):
        return
    try:
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # ENXIO: to open it for writing would wait for a reader
        raise UsageError(f"{flag} {path} is a pipe that nobody reads; start its reader first") from None
