"""Hashes of large files that are known again without reading them, by their place, size and time."""

import contextlib
import hashlib
import json
from pathlib import Path

from models.base.errors import NestlingError
from models.base.files import default_cache_dir, hash_files, write_text

WORTH_KEEPING = 2**24
"""Bytes that take longer to hash than a look into the user's cache."""


def known_hash(*paths: Path) -> str:
    """Return `hash_files(*paths)`; large files that did not change since the last time are not read.

    A file that was rewritten within the clock of its file system, with its size, counts as unchanged: only
    what may be stale without harm is to be found by this hash.
    """
    facts = [path.stat() for path in paths]
    if sum(one.st_size for one in facts) < WORTH_KEEPING:
        return hash_files(*paths)
    names = [str(path.resolve()) for path in paths]
    state = [[name, one.st_size, one.st_mtime_ns, one.st_ino] for name, one in zip(names, facts, strict=True)]
    key = hashlib.sha256(json.dumps(state).encode("utf-8", "surrogatepass")).hexdigest()[:32]
    kept = default_cache_dir() / f"hash-{key}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = kept.read_text()
        if len(found) == hashlib.sha256().digest_size * 2:
            return found
    digest = hash_files(*paths)
    with contextlib.suppress(OSError, NestlingError):  # a cache that cannot be written costs time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, digest)
    return digest
