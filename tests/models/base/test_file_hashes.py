"""A hash that is known again is that of the content, until the file changes."""

import os
from pathlib import Path

import pytest

from models.base import file_hashes
from models.base.file_hashes import WORTH_KEEPING, known_hash
from models.base.files import hash_files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nestling"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(b"a" * WORTH_KEEPING)
    return path


def test_a_large_file_is_read_once_and_again_when_it_changed(
    large: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = known_hash(large)
    assert first == hash_files(large)
    with monkeypatch.context() as patch:
        patch.setattr(file_hashes, "hash_files", None)
        assert known_hash(large) == first
    large.write_bytes(b"b" * WORTH_KEEPING)
    assert known_hash(large) == hash_files(large) != first
    os.utime(large, ns=(0, 0))
    assert known_hash(large) == hash_files(large)
    assert len(list(cache.iterdir())) == 3


def test_small_files_and_a_cache_that_cannot_be_used_cost_nothing_but_time(large: Path, cache: Path) -> None:
    small = large.with_name("small")
    small.write_bytes(b"small")
    assert known_hash(small) == hash_files(small)
    assert not cache.exists()
    cache.parent.write_text("no folder")
    assert known_hash(large, small) == hash_files(large, small)
    cache.parent.unlink()
    known_hash(large)
    next(cache.iterdir()).write_bytes(b"\xff damaged")
    assert known_hash(large) == hash_files(large)
