import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.base.errors import UsageError
from train.data.cache import MANIFEST, build_once


class Builder:
    """Writes one file and counts how often."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.num_builds = 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.num_builds += 1
        time.sleep(self.seconds)
        (folder / "data.bin").write_bytes(b"content")
        return {"number": self.num_builds}


def flip_byte(folder: Path) -> None:
    (folder / "data.bin").write_bytes(b"contEnt")


def truncate(folder: Path) -> None:
    (folder / "data.bin").write_bytes(b"cont")


def remove_data(folder: Path) -> None:
    (folder / "data.bin").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": [')


def foreign_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"files": []}')


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    build = Builder()

    assert build_once(tmp_path / "entry", build) == {"number": 1}
    assert build_once(tmp_path / "entry", build) == {"number": 1}
    assert (tmp_path / "entry" / "data.bin").read_bytes() == b"content"


@pytest.mark.parametrize(
    "damage",
    [flip_byte, truncate, remove_data, remove_manifest, spoil_manifest, foreign_manifest],
)
def test_a_damaged_entry_is_named_and_built_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    build_once(tmp_path / "entry", build)
    damage(tmp_path / "entry")

    with caplog.at_level(logging.WARNING):
        assert build_once(tmp_path / "entry", build) == {"number": 2}

    assert (tmp_path / "entry" / "data.bin").read_bytes() == b"content"
    assert f"{tmp_path / 'entry'} is damaged" in caplog.text


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "data.bin").write_bytes(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        build_once(tmp_path / "entry", build)

    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


def test_the_rest_of_a_killed_build_is_swept(tmp_path: Path) -> None:
    orphan = tmp_path / ".entry.0000.partial"
    orphan.mkdir()
    (orphan / "data.bin").write_bytes(b"half")

    build_once(tmp_path / "entry", Builder())

    assert not orphan.exists()


def test_those_who_start_together_wait_for_one_build(tmp_path: Path) -> None:
    build = Builder(seconds=0.1)
    threads = [threading.Thread(target=build_once, args=(tmp_path / "entry", build)) for _ in range(4)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert build.num_builds == 1


def test_a_place_that_cannot_be_written_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(UsageError, match=r"^data.cache_dir='.*file': cannot be written \(.*\); ch"):
        build_once(tmp_path / "file" / "entry", Builder())
