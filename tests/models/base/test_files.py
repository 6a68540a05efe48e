"""Whole or absent: whatever happens in the middle."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from models.base.errors import NestlingError, UsageError
from models.base.files import (
    check_replaceable,
    clear_interrupted,
    default_cache_dir,
    make_folder,
    read_json,
    remove_folder,
    sweep,
    write_file,
    write_folder,
    write_json,
    write_text,
)

MARKER = "nestling.json"


class FullDisk(OSError):
    """What the operating system raises for one byte too many."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device")


def fill(folder: Path, text: str) -> None:
    write_json(folder / MARKER, {"text": text})


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with write_folder(target) as folder:
        fill(folder, "new")
        assert not target.exists()
    assert read_json(target / MARKER) == {"text": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def write_half(target: Path, failure: type[BaseException]) -> None:
    with write_folder(target) as folder:
        fill(folder, "half")
        raise failure


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure):
        write_half(tmp_path / "new", failure)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_stood_there(tmp_path: Path) -> None:
    with write_folder(tmp_path / "model") as folder:
        fill(folder, "old")
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "model", RuntimeError)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert read_json(tmp_path / "model" / MARKER) == {"text": "old"}


def test_our_own_folder_is_replaced_not_merged(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with write_folder(target) as folder:
        fill(folder, "old")
        (folder / "left over").touch()
    with write_folder(target) as folder:
        fill(folder, "new")
    assert [path.name for path in target.iterdir()] == [MARKER]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with write_folder(tmp_path / "model") as folder:
        fill(folder, "new")
    assert (tmp_path / "model" / MARKER).is_file()


def test_a_link_keeps_pointing_to_where_the_bytes_go(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "big disk")
    with write_folder(tmp_path / "model") as folder:
        fill(folder, "new")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "big disk" / MARKER).is_file()


def test_somebody_elses_folder_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not ours to replace"), write_folder(tmp_path):
        raise AssertionError("the block must not run")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("not a folder")
    with pytest.raises(UsageError, match="is not a folder"), write_folder(tmp_path / "model"):
        raise AssertionError("the block must not run")


def test_a_file_among_the_parents_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is not a folder"), write_folder(tmp_path / "file" / "model"):
        raise AssertionError("the block must not run")


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="No space left"):
        write_half(tmp_path / "model", FullDisk)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_complete_or_what_stood_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.bin"

    def write(content: bytes, failure: type[OSError] | None = None) -> None:
        with write_file(path) as partial:
            partial.write_bytes(content)
            if failure is not None:
                raise failure

    write(b"whole")
    with pytest.raises(NestlingError, match=r"model\.bin.*No space left"):
        write(b"ha", FullDisk)
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_device_is_written_to_and_never_replaced() -> None:
    before = Path("/dev/null").stat()
    write_json("/dev/null", {"text": "gone"})
    with write_file("/dev/null") as partial:
        partial.write_text("gone")
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/null").stat().st_ino == before.st_ino


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"text": "through"})
    assert json.loads(os.read(reader, 100)) == {"text": "through"}
    os.close(reader)
    assert pipe.is_fifo()


def test_an_open_file_keeps_what_it_holds(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        write_text(f"/proc/self/fd/{log.fileno()}", "after\n")
    assert (tmp_path / "log").read_text() == "before\nafter\n"


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "results.json")
    write_json(tmp_path / "link", {"text": "new"})
    assert (tmp_path / "link").is_symlink()
    assert read_json(tmp_path / "results.json") == {"text": "new"}


def test_a_path_that_is_not_utf8_is_written_and_read_back(tmp_path: Path) -> None:
    path = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / path, {"path": path})
    assert read_json(tmp_path / path) == {"path": path}


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(NestlingError, match="set XDG_CACHE_HOME"):
        default_cache_dir()


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": float("nan"), "deep": [float("inf"), (1.5, "é")]})
    assert read_json(tmp_path / "a.json") == {"loss": None, "deep": [None, [1.5, "é"]]}


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "is missing"), (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[1]", "holds a list")],
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NestlingError, match=named) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


# ---------------------------------------------------------------- what a killed writer leaves


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".00000003.ab12.partial").mkdir()
    (tmp_path / ".a.json.ab12.partial").write_text("{")
    (tmp_path / ".hidden").touch()
    (tmp_path / "model.partial").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "model.partial"]


def test_a_writer_killed_between_its_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".model.ab12.replaced").mkdir()
    write_json(tmp_path / ".model.ab12.replaced" / MARKER, {"old": 1})
    (tmp_path / ".model.cd34.partial").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert read_json(tmp_path / "model" / MARKER) == {"old": 1}


def test_a_writer_killed_after_its_two_renames_keeps_the_new(tmp_path: Path) -> None:
    with write_folder(tmp_path / "model") as folder:
        fill(folder, "new")
    (tmp_path / ".model.ab12.replaced").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert read_json(tmp_path / "model" / MARKER) == {"text": "new"}


def test_a_stop_between_the_two_renames_puts_back_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with write_folder(tmp_path / "model") as folder:
        fill(folder, "old")
    rename = Path.rename

    def stop_after_the_first(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        rename(self, target)
        raise SystemExit(143)

    def replace_it() -> None:
        with write_folder(tmp_path / "model") as folder:
            fill(folder, "new")
            monkeypatch.setattr(Path, "rename", stop_after_the_first)

    with pytest.raises(SystemExit):
        replace_it()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert read_json(tmp_path / "model" / MARKER) == {"text": "old"}


def test_a_place_where_a_writer_died_is_still_ours(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.ab12.partial").touch()
    check_replaceable(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UsageError, match="not ours"):
        check_replaceable(tmp_path)


def test_a_removal_that_dies_in_the_middle_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    remove_folder(tmp_path / "old")
    assert not (tmp_path / "old").exists()
    monkeypatch.undo()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_its_parents_are_forced_to_disk_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("models.base.files.sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    synced.clear()
    with write_folder(tmp_path / "a" / "b" / "model") as folder:
        fill(folder, "new")
    assert synced[-1] == tmp_path / "a" / "b"
    assert {path.name for path in synced[:-1]} >= {MARKER, folder.name}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_still_takes_files(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_folders)
    write_json(tmp_path / "a.json", {"a": 1})
    with write_folder(tmp_path / "deep" / "folder", marker="mark") as partial:
        (partial / "mark").write_text("")
        (partial / "inner").mkdir()
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert (tmp_path / "deep" / "folder" / "mark").is_file()


def test_a_file_that_cannot_be_synced_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", nothing)
    with pytest.raises(NestlingError, match=r"cannot write .*a\.json.*: Invalid argument"):
        write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_a_byte_order_mark_in_a_json_file_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize("published", [False, True])
def test_what_a_killed_writer_was_about_to_replace_is_put_back_or_goes(
    published: bool, tmp_path: Path
) -> None:
    final, aside = tmp_path / "model", tmp_path / ".model.0a0a0a0a.replaced"
    aside.mkdir()
    fill(aside, "old")
    if published:
        final.mkdir()
        fill(final, "new")
    clear_interrupted(final)
    assert read_json(final / MARKER) == {"text": "new" if published else "old"}
    assert list(tmp_path.iterdir()) == [final]


def test_an_error_names_the_folder_that_was_asked_for(tmp_path: Path) -> None:
    with (
        pytest.raises(NestlingError, match=f"^{tmp_path / 'model' / 'a.json'} is missing"),
        write_folder(tmp_path / "model") as partial,
    ):
        read_json(partial / "a.json")
