"""The door itself: help, flags, overrides, exit codes; no model is opened here."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from models.base.errors import NestlingError
from train.cli import COMMANDS, main

LIGHT = "import sys; from train.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    """The one line on stderr of a command that fails with this exit code."""
    assert main([str(argument) for argument in arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nestling: error: ")
    return line


def raiser(error: BaseException) -> object:
    def raise_it(*_: object, **__: object) -> NoReturn:
        raise error

    return raise_it


@pytest.mark.parametrize("arguments", [["--help"], [], ["train", "--help"], ["generate", "-h"]])
def test_help_comes_without_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-c", LIGHT, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage: nestling" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Usage: nestling {command} " in out
    assert f"Example: nestling {command} " in out
    assert "\x1b" not in out, "colours where there is no terminal"


@pytest.mark.parametrize("command", ["train", "distill"])
def test_the_help_of_train_shows_three_dials_and_with_help_all_every_recipe_key(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.recipe.recipe import recipe_help

    keys = [row.key for row in recipe_help()]
    main([command, "--help"])
    out = capsys.readouterr().out
    assert [dial for dial in ("size=", "tokens=", "members=", "--help-all") if dial not in out] == []
    assert len([key for key in keys if "." in key and key in out]) <= 1, "distill names loss.teacher"
    assert main([command, "--help-all"]) == 0
    out = capsys.readouterr().out
    assert [key for key in keys if key not in out] == []


@pytest.mark.parametrize("command", ["distill", "search"])
def test_what_is_not_there_yet_is_not_offered(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command in fails(capsys, command, code=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["extract"], "MODEL"),
        (["extract", "somewhere", "--out", "x"], "--granularity"),
        (["generate", "somewhere"], "--prompt"),
        (["generate", "somewhere", "--prompt", "x", "--temperature", "warm"], "warm"),
        (["generate", "somewhere", "--prompt", "x", "--temprature", "1"], "--temprature"),
        (["evaluate", "somewhere", "--data"], "--data"),
        (["report"], "RUN"),
        (["machine", "fast"], "fast"),
    ],
)
def test_a_wrong_flag_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, *arguments, code=2)
    assert named in line
    assert f"nestling {arguments[0]} --help" in line


@pytest.mark.parametrize(("path", "named"), [("missing/x.json", "does not exist"), (".", "is a folder")])
def test_a_place_for_results_that_cannot_be_is_named_before_any_work(
    path: str,
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.machine.card.machine_card", raiser(AssertionError("measured too early")))
    monkeypatch.chdir(tmp_path)
    assert named in fails(capsys, "machine", "--json", path, code=2)


def test_what_the_machine_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk = OSError(errno.ENOSPC, "No space left on device", "somewhere/file")
    for error, named in (
        (full_disk, "somewhere/file: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "locked"), "locked: Permission denied"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (NestlingError("several\nlines"), "several"),
    ):
        monkeypatch.setattr("models.checkpoint.folder.load_model", raiser(error))
        assert main(["extract", "m", "--granularity", "S", "--out", str(tmp_path / "x")]) == 1
        assert named in capsys.readouterr().err.splitlines()[0]


EXTRACT = ["extract", "m", "--granularity", "S", "--out", "x"]


class PanicException(BaseException):
    """Like it, no `Exception`."""


@pytest.mark.parametrize(
    "defect",
    [KeyError("ours"), RuntimeError("ours"), ValueError("two\nlines"), PanicException("of Rust")],
)
def test_a_defect_of_ours_is_one_line_and_its_traceback_lies_in_a_file(
    defect: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.checkpoint.folder.load_model", raiser(defect))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line = fails(capsys, *EXTRACT, code=1)
    assert f"this is a defect of nestling ({type(defect).__name__} at test_cli.py:" in line
    (report,) = tmp_path.iterdir()
    assert line.endswith(f"please report it with the traceback in {report}")
    text = report.read_text()
    assert text.startswith("nestling extract m")
    assert "Traceback (most recent call last)" in text


def test_a_traceback_that_cannot_be_kept_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.checkpoint.folder.load_model", raiser(KeyError("ours")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert main(EXTRACT) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "report it with the traceback above" in err.splitlines()[-1]


PRINT = "from train.cli import main; import models.checkpoint.folder as f\n"
PRINT += "def say(*_, **__): print('caf\\u00e9 \\u201cx\\u201d caf\\udce9'); raise SystemExit(0)\n"
PRINT += f"f.load_model = say; main({EXTRACT!r})"


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "caf? ?x? caf?"), ("utf-8", "café “x” caf?")])
def test_what_the_terminal_cannot_show_is_replaced(encoding: str, shown: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding).strip() == shown


def test_a_closed_stdout_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["machine", "--help"]) == 0


def test_an_interrupted_command_says_so_and_exits_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.checkpoint.folder.load_model", raiser(KeyboardInterrupt()))
    assert main(["extract", "m", "--granularity", "S", "--out", "x"]) == 130
    assert capsys.readouterr().err == "nestling: stopped\n"
