"""What a command would write is checked before the work: it can be, and replaces nothing that is read."""

import os
import socket
from pathlib import Path

import pytest

from models.base.errors import NestlingError, UsageError
from models.base.files import check_replaceable, write_text
from models.base.outputs import check_apart, check_output


@pytest.mark.parametrize(("name", "named"), [("missing/x", "missing does not exist"), (".", "is a folder")])
def test_an_output_that_cannot_be_is_named_before_the_work(name: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--json .*{named}"):
        check_output("--json", tmp_path / name)
    for path in (Path("/dev/null"), tmp_path / "new.json"):
        check_output("--json", path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("weights")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model.safetensors", "new.json", "../link", "../hard"])
def test_a_file_in_a_folder_that_is_read_is_no_output(name: str, folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder / "model.safetensors")
    (folder.parent / "hard").hardlink_to(folder / "model.safetensors")
    with pytest.raises(UsageError, match=f"--json {folder / name} (lies in|is a file of) MODEL {folder};"):
        check_apart({"--json": folder / name}, {"MODEL": folder})


def test_a_file_that_is_read_is_no_output_by_whatever_name(folder: Path) -> None:
    text, link = folder.parent / "t.txt", folder.parent / "link"
    text.write_text("text")
    link.symlink_to(text)
    for out in (text, link, folder / ".." / "t.txt"):
        with pytest.raises(UsageError, match="is --data itself; choose another place"):
            check_apart({"--json": out}, {"MODEL": folder, "--data": str(text)})


def test_a_folder_around_one_that_is_read_is_no_output(folder: Path) -> None:
    with pytest.raises(UsageError, match="holds MODEL"):
        check_apart({"--out": folder.parent}, {"MODEL": folder})


def test_a_place_beside_what_is_read_is_an_output(folder: Path) -> None:
    check_apart(
        {"--json": folder.parent / "model.json"}, {"MODEL": folder, "--data": "stdlib", "--draft": []}
    )
    check_apart({"--json": Path("/dev/null"), "--plot": None}, {"--data": "/dev/null"})


def test_a_link_in_a_circle_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match=r"--json .*a: Too many levels of symbolic links; choose"):
        check_output("--json", tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").is_symlink()


def test_a_name_that_is_too_long_is_refused_with_the_flag(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--json .*: File name too long; choose another place"):
        check_output("--json", tmp_path / ("x" * 300))


def test_a_pipe_that_nobody_reads_and_a_socket_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UsageError, match="--json pipe is a pipe that nobody reads"):
        check_output("--json", Path("pipe"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(UsageError, match="--json socket is a socket"):
            check_output("--json", Path("socket"))


def test_a_pipe_whose_reader_left_is_named_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(NestlingError, match=f"cannot write {pipe}: nobody reads it; keep its reader"):
        write_text(pipe, "text")


def test_a_folder_is_never_put_in_the_place_of_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(UsageError, match="Too many levels of symbolic links"):
        check_replaceable(tmp_path / "a")


def test_the_longest_name_that_the_system_takes_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_the_reader_of_a_pipe_waits_from_the_check_to_the_writing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_output("--json", pipe)
    with pytest.raises(BlockingIOError):  # with no writer left it would be the end
        os.read(reader, 1)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
