"""The step is compiled once, and without a compiler there is a reason, not a crash."""

import logging
from pathlib import Path

import pytest

from models.base.errors import NestlingError, UsageError
from models.kernels import build as building
from models.kernels.build import SOURCES, build, library, load


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
