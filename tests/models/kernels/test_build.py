"""The step is compiled once, and without a compiler there is a reason, not a crash."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.base.errors import NestlingError, UsageError
from models.kernels import build as building
from models.kernels.build import SOURCES, build, kernels_name, library, load


@pytest.fixture(autouse=True)
def compiled_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried here does not depend on how well it is compiled."""
    monkeypatch.setattr(building, "FLAGS", [flag.replace("-O3", "-O0") for flag in building.FLAGS])


@pytest.mark.parametrize("name", SOURCES)
def test_it_is_compiled_once_and_loads(compiled: None, name: str, tmp_path: Path) -> None:
    path = build(name, cache_dir=tmp_path / "new")
    written = path.stat().st_mtime_ns
    assert build(name, cache_dir=tmp_path / "new") == path
    assert path.stat().st_mtime_ns == written
    assert [*path.parent.iterdir()] == [path]
    assert getattr(load(path, name), SOURCES[name][0]) is not None


def test_compiling_is_announced_once(
    compiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(cache_dir=tmp_path)
    assert capsys.readouterr().err == "compiling for this processor, once (decoding) ...\n"
    build(cache_dir=tmp_path)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("crowded", "given", "expected"),
    [
        (False, {}, "None"),
        (True, {}, "3000"),
        (True, {"GOMP_SPINCOUNT": "7"}, "7"),
        (True, {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_threads_that_wait_soon_sleep_on_a_crowded_machine_unless_the_user_says_otherwise(
    crowded: bool, given: dict[str, str], expected: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = (
        "import os, sys; import models.base.processor as one;"
        f"os.environ.pop('GOMP_SPINCOUNT', 0) if {not given} else 0; one.is_crowded = lambda: {crowded};"
        "del sys.modules['models']; import models; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_what_runs_is_named(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_name().startswith("compiled for A")
    monkeypatch.setattr(building, "library", lambda: None)
    assert kernels_name() == "torch's kernels"


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler", "'no-such-compiler'; install gcc or name another by CC"),
        ("false", "cannot compile"),
    ],
)
def test_without_a_compiler_it_says_why(
    compiler: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(NestlingError, match=words):
        build(cache_dir=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.so").write_bytes(b"nothing")
    with pytest.raises(NestlingError, match=r"step.so cannot be loaded .* remove it"):
        load(tmp_path / "step.so")


def test_it_can_be_switched_off_and_a_refusal_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "default_cache_dir", lambda: tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert library.__wrapped__() is None
    assert "decoding runs on torch's kernels: there is no C compiler" in caplog.text
    caplog.clear()
    monkeypatch.setenv("NESTLING_NATIVE", "0")
    assert library.__wrapped__() is None
    assert not caplog.text
    monkeypatch.setenv("NESTLING_NATIVE", "off")
    with pytest.raises(UsageError, match="NESTLING_NATIVE=off is neither 0"):
        library.__wrapped__()


def test_a_damaged_one_is_made_again(
    compiled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "default_cache_dir", lambda: tmp_path)
    build().write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        assert library.__wrapped__() is not None
    assert not caplog.text


@pytest.mark.parametrize("value", ["", "  "])
def test_a_blank_cc_is_as_good_as_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", value)
    assert building.compiler_words() == ["cc"]


@pytest.mark.parametrize("value", ["gcc '", '"', "gcc \\"])
def test_a_cc_that_cannot_be_read_is_named_and_torch_decodes(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", value)
    library.cache_clear()
    assert library() is None
    library.cache_clear()
    assert f"CC={value!r} cannot be read" in caplog.text


def test_nothing_is_compiled_where_nothing_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "runs_nothing", lambda folder: folder == tmp_path / "cache")
    with pytest.raises(NestlingError, match=r"cache is on a file system mounted noexec; set XDG_CACHE_HOME"):
        build(cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_on_a_file_system_that_runs_programs_is_known(tmp_path: Path) -> None:
    assert not building.runs_nothing(tmp_path / "not" / "made" / "yet")
    if Path("/proc").is_mount() and os.statvfs("/proc").f_flag & os.ST_NOEXEC:
        assert building.runs_nothing(Path("/proc"))


def test_a_compiler_that_takes_too_long_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[[Callable[[], object]], None]
) -> None:
    driver, started = tmp_path / "cc", tmp_path / "started"
    driver.write_text(
        f"#!/bin/sh\nsleep 600 & echo $! > {started}.part && mv {started}.part {started}\nwait\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("CC", str(driver))
    for seconds in (0.5, 5, 50):  # a busy machine may take long to start it
        monkeypatch.setattr(building, "BUILD_SECONDS", seconds)
        with pytest.raises(NestlingError, match="timed out"):
            build(cache_dir=tmp_path / "new")
        if started.exists():
            break
    child = int(started.read_text())
    wait_until(lambda: not is_running(child))  # it is reaped by the system's first process, a moment later


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
