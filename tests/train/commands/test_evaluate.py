"""`nestling evaluate`: a row per member, trained or not; mistakes in one line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from train.cli import main

MIXED = "ffn=1:0.5:0.25"
Fails = Callable[..., str]


def test_every_member_and_what_was_asked_for_is_measured(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "evaluate.json"
    flags = ["--data", str(text), "--granularity", MIXED, "--granularity", "S", "--json", str(results)]
    assert main(["evaluate", str(model), *flags]) == 0
    table = capsys.readouterr().out
    assert "218k" in table
    assert MIXED in table
    written = json.loads(results.read_text())
    members = {member["name"]: member for member in written["members"]}
    assert list(members) == ["S", "D", MIXED, "XL"], "once each, the smallest first"
    assert members["XL"]["match"] == 100
    assert members["XL"]["alpha"] == pytest.approx(1)
    assert members["XL"]["perplexity"] == pytest.approx(math.exp(members["XL"]["loss"]))
    assert all(0 < members[name]["alpha"] < 1 for name in ("S", "D", MIXED))


def test_max_tokens_bounds_what_is_measured(model: Path, text: Path, tmp_path: Path) -> None:
    counts = []
    for flags in (["--max-tokens", "64"], []):
        results = tmp_path / "evaluate.json"
        assert main(["evaluate", str(model), "--data", str(text), *flags, "--json", str(results)]) == 0
        counts.append(json.loads(results.read_text())["num_tokens"])
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize(
    ("flags", "named", "code"),
    [
        (["--data", "nowhere.txt"], "--data nowhere.txt", 2),
        (["--data", "nowhere/at_all"], "--data nowhere/at_all", 2),
        (["--data", "."], "--data .", 2),
        (["--data", "empty.txt"], "empty.txt", 1),
        (["--data", "picture.png"], "picture.png", 2),
        (["--data", "text.txt", "--max-tokens", "-1"], "--max-tokens", 2),
        (["--data", "text.txt", "--granularity", "Q"], "'Q'", 2),
        (["--data", "text.txt", "--granularity", "layers=0:9"], "layer 9", 2),
        (["--data", "text.txt", "--json", "missing/x.json"], "--json missing/x.json", 2),
    ],
)
def test_what_cannot_be_measured_is_named(
    flags: list[str],
    named: str,
    code: int,
    model: Path,
    text: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(text.parent)
    Path("empty.txt").write_text("")
    Path("picture.png").write_bytes(b"\x89PNG")
    assert named in fails("evaluate", model, *flags, code=code)


def test_a_text_is_read_as_the_models_own_was_or_as_the_flag_says(
    model: Path, tmp_path: Path, fails: Fails
) -> None:
    other = tmp_path / "model"
    shutil.copytree(model, other)
    told = json.loads((other / "nestling.json").read_text())
    told["provenance"]["recipe"]["data"]["text_field"] = "content"
    (other / "nestling.json").write_text(json.dumps({**told, "provenance": told["provenance"]}))
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"content": "def area(width, height):\n" * 40, "body": "x = 1\n" * 90}) + "\n")

    measured = ("--data", data, "--max-tokens", 64)
    assert main(["evaluate", str(other), *map(str, measured)]) == 0
    assert main(["evaluate", str(model), *map(str, measured), "--text-field", "body"]) == 0
    line = fails("evaluate", model, *measured, code=2)
    assert "--text-field='text'" in line
    assert "it has: content, body" in line
    line = fails("search", model, "--draft", "--data", data, code=2)
    assert "--text-field='text'" in line
    line = fails("bench", model, "--data", data, "--text-field", "nothing", code=2)
    assert "--text-field='nothing'" in line
    line = fails("bench", model, "--text-field", "body", code=2)
    assert "has no effect without --data" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--data is missing"),
        (["--limit", "3", "--data", "text.txt"], "--limit 3 goes with --tasks"),
        (["--tasks", "arc_easy", "--data", "text.txt"], "two measurements"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit must be at least 1, got 0"),
    ],
)
def test_flags_of_tasks_and_of_texts_exclude_each_other(
    flags: list[str], named: str, model: Path, text: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    assert named in fails("evaluate", model, *flags, code=2)


def test_tasks_are_scored_for_each_member(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("models.measure.harness.find_tasks", lambda names: (names, None))
    monkeypatch.setattr(
        "models.measure.harness.run_tasks",
        lambda view, *_, **__: {"words": {"acc": len(view.plan.layers) / 4}},
    )
    path = tmp_path / "tasks.json"
    assert main(["evaluate", str(model), "--tasks", "words", "--json", str(path)]) == 0
    assert "words acc" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["tasks"]["D"] == {"words": {"acc": 0.5}}
    assert written["granularities"]["D"] == "layers=0-1"
