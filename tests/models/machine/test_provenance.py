"""The card of a result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.machine.provenance import commit, make_card


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_card_says_where_numbers_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nestling", "generate", "--prompt", "two words"])
    card = json.loads(json.dumps(make_card(dtypes={"model": "bf16"})))
    assert card["command"] == "nestling generate --prompt 'two words'"
    assert card["dtypes"] == {"model": "bf16"}
    assert card["threads"] == 1
    assert {"cpu", "cores", "gpu", "system"} == card["hardware"].keys()
    assert {"python", "nestling", "torch"} <= card["versions"].keys()
    assert card["date"].endswith("+00:00")


def test_a_commit_is_named_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) is None, "no commit yet"
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == f"{head}-dirty"


def test_an_installation_inside_somebody_elses_checkout_has_no_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    assert commit(tmp_path / "site-packages") is None
