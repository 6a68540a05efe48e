"""A run folder is written by one run at a time; a killed process holds no lock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.base.errors import UsageError
from train.run.lock import RunLock

HOLD = """
import sys
from pathlib import Path
from train.run.lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_writes_to_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with RunLock(tmp_path) as lock, pytest.raises(UsageError, match=f"--out {tmp_path}: another run"):
            lock.take()
        other.kill()
        other.wait()
    with RunLock(tmp_path) as lock:
        lock.take()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_block_and_is_taken_once(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path / "new") as lock:
            lock.take()
            (tmp_path / "new").mkdir(exist_ok=True)
            lock.take()
            lock.take()
            with pytest.raises(UsageError, match="another run"):
                RunLock(tmp_path / "new").take()
