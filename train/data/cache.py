"""A folder that is built once: keyed by the content it was made from, checked whenever it is opened.

    <name>-<key>/    the files; manifest.json, written last: their sizes and SHA-256, and some facts

A damaged or unfinished entry is named and built again. Processes that start together wait for one.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from models.base.errors import NestlingError, UsageError
from models.base.files import hash_files, read_json, write_folder, write_json

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def content_key(*parts: object) -> str:
    """Return a short name for what an entry is made from.

    >>> content_key("a", 1) == content_key("a", 1), content_key("a", 1) == content_key("a", 2)
    (True, False)
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of an entry, which is built first if it is absent or damaged.

    Args:
        folder: the entry; its parents are made.
        build: fills an empty folder with files and returns facts that JSON can hold.

    Raises:
        UsageError: if the cache cannot be written there.
        NestlingError: if the disk refuses later on.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise UsageError(
            f"data.cache_dir={str(folder.parent)!r}: cannot be written ({error.strerror}); "
            "choose another folder"
        ) from error
    try:
        return open_entry(folder) or _build(folder, build)
    finally:
        lock.release()


def open_entry(folder: Path) -> dict[str, Any] | None:
    """Return the facts of an entry, or None if it is absent or damaged."""
    if not folder.exists():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        for name, expected in manifest["files"].items():
            if seal(folder / name) != expected:
                raise NestlingError(f"{name} is not what was written")
        facts: dict[str, Any] = manifest["facts"]
    except (NestlingError, OSError, KeyError, AttributeError) as error:
        logger.warning("%s is damaged (%s); building it again", folder, error)
        return None
    return facts


def seal(path: Path) -> dict[str, Any]:
    """Return size and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": hash_files(path)}


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    # we hold the lock: what lies about is the rest of a build that was killed
    for orphan in (folder, *folder.parent.glob(f".{folder.name}.*")):
        shutil.rmtree(orphan, ignore_errors=True)
    with write_folder(folder, marker=MANIFEST) as partial:
        facts = build(partial)
        files = {path.name: seal(path) for path in sorted(partial.iterdir())}
        write_json(partial / MANIFEST, {"files": files, "facts": facts})
    return facts
