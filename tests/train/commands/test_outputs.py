"""No command replaces what it reads: it is refused before the work, whatever the flag."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from train.cli import main

Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("words", "out", "named"),
    [
        ("extract MODEL --granularity S --out new --json", "MODEL/model.safetensors", "lies in MODEL"),
        ("evaluate MODEL --data TEXT --json", "TEXT", "is --data itself"),
        ("generate MODEL --prompts TEXT --json", "TEXT", "is --prompts itself"),
        ("generate MODEL --prompt x --draft TEXT@int8 --json", "TEXT", "is --draft itself"),
        ("import TEXT --out new --json", "TEXT", "is SOURCE itself"),
        ("search MODEL --draft --data TEXT --json", "MODEL/config.json", "lies in MODEL"),
        ("verify MODEL --json", "MODEL/config.json", "lies in MODEL"),
        ("bench MODEL --data TEXT --json", "TEXT", "is --data itself"),
        ("bench MODEL --json b.svg --plot", "b.svg", "is --json itself"),
        ("bench --train --config tiny data.source=TEXT --json", "TEXT", "is data.source itself"),
        ("extract MODEL --granularity S --out", "MODEL", "is MODEL itself"),
        ("extract MODEL --granularity S --format gguf --json S.gguf --out", "S.gguf", "is --out itself"),
        ("distill MODEL --config tiny --resume never --out", "MODEL/..", "holds loss.teacher"),
    ],
)
def test_what_a_command_reads_is_never_replaced(
    words: str,
    out: str,
    named: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def places(word: str) -> str:
        return word.replace("MODEL", str(model)).replace("TEXT", str(text))

    files = [text, *(path for path in model.parent.rglob("*") if path.is_file())]
    before = [path.read_bytes() for path in files]
    assert named in fails(*map(places, words.split()), places(out), code=2)
    assert [path.read_bytes() for path in files] == before
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_results_that_a_full_disk_does_not_take_are_named(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(model), "--data", str(text), "--max-tokens", "64", "--json", "/dev/full"]
    assert main(words) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "nestling: error: /dev/full: No space left on device; make room, or choose another place"


def test_a_gguf_file_that_a_full_disk_does_not_take_is_named(
    model: Path, tmp_path: Path, fails: Fails
) -> None:
    words = ("extract", model, "--granularity", "S", "--format", "gguf", "--out", tmp_path / "S.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        line = fails(*words, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {tmp_path / 'S.gguf'}: " in line
    assert line.endswith("make room or give permission, or choose another place")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blank", [["--json", ""], ["--json="]])
def test_a_blank_path_is_named_as_it_was_given(blank: list[str], model: Path, fails: Fails) -> None:
    assert "--json '' is blank; give a path" in fails("generate", model, "--prompt", "x", *blank, code=2)
