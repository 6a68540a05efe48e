import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base.errors import NestlingError, UsageError
from train.data import files
from train.data.files import LocalFiles, find_files, read_txt


def find(source: Path | str, **settings: Any) -> LocalFiles:
    options: dict[str, Any] = {
        "text_field": "text",
        "separator": "<|endoftext|>",
        "key": "data.source",
        **settings,
    }
    return find_files(str(source), cache_dir=None, **options)


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_line_with_the_separator_ends_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\nmore\n<|endoftext|>\n\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\nthree\n")

    assert list(find(path).documents()) == ["one\n\nmore", "two", "three\n"]


def test_line_ends_inside_and_indented_separators_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n  <|endoftext|>\n\x0cfour")
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))

    for source in (path, packed):
        assert list(find(source).documents()) == ["one\r\ntwo\rthree\n  <|endoftext|>\n\x0cfour"]


def test_the_separator_is_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n---\ntwo<|endoftext|>\n")

    assert list(find(path, separator="---").documents()) == ["one", "two<|endoftext|>\n"]


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="-")).filter(str.strip)),
)
def test_documents_of_a_text_file_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    texts = [text.removesuffix("\r") for text in texts]  # would be taken for the end of a line
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes("".join(f"{text}\n---\n" for text in texts).encode())

    files = find(path, separator="---")

    assert list(read_txt(path, files))[:-1] == texts


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_packed_files_hold_the_same_documents(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(pack("ä\n<|endoftext|>\nb".encode()))
    rows = tmp_path / f"b.jsonl{suffix}"
    rows.write_bytes(pack(b'{"text": "c"}\n'))

    assert list(find(text).documents()) == ["ä", "b"]
    assert list(find(rows).documents()) == ["c"]
    assert find(text).num_bytes is None


def test_json_lines_give_their_field_and_leave_out_nulls_and_blanks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}, {"body": None}, {"body": " "}])
    with path.open("a") as file:
        file.write('\n{"late": 1, "body": "two\\ud800"}\n')

    documents = list(find(path, text_field="body").documents())

    assert documents == ["one", "two\N{REPLACEMENT CHARACTER}"]


def test_parquet_gives_its_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), path)

    files = find_files(
        str(path), text_field="text", separator="", cache_dir=tmp_path / "cache", key="data.source"
    )

    assert list(files.documents()) == ["one", "two"]


def test_a_folder_and_a_glob_give_their_files_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md"):
        (tmp_path / name).write_text(name)

    assert list(find(tmp_path).documents()) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(find(tmp_path / "*.txt").documents()) == ["a.txt", "b.txt"]
    assert list(find(tmp_path / "**/c.txt").documents()) == ["sub/c.txt"]


def test_the_fingerprint_follows_content_and_settings_not_names(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one")
    second.write_text("one")

    assert find(first).fingerprint == find(second).fingerprint
    assert find(first).fingerprint != find(first, separator="-").fingerprint
    second.write_text("two")
    assert find(first).fingerprint != find(second).fingerprint


def test_a_missing_path_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data.valid='.*none.txt': no such file or folder; give"):
        find(tmp_path / "none.txt", key="data.valid")


@pytest.mark.parametrize("name", ["a.pdf", "a.parquet.gz", "a"])
def test_a_kind_that_cannot_be_read_is_wrong_usage(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")

    with pytest.raises(UsageError, match=f"{name} is nothing that can be read; give .txt"):
        find(tmp_path / name)
    with pytest.raises(UsageError, match="the folder holds nothing that can be read"):
        find(tmp_path)


def test_a_missing_field_names_those_that_exist(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"body": "two", "id": 2}])
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one"], "id": [1]}), table)

    with pytest.raises(UsageError, match=r"text_field='text': .*line 2, has no .*: body, id$"):
        list(find(rows).documents())
    with pytest.raises(UsageError, match=r"text_field='text': .*a.parquet has no .*: body, id$"):
        list(find(table).documents())


def test_a_field_that_is_no_text_is_wrong_usage(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": 5}])

    with pytest.raises(UsageError, match=r"line 1, holds int, not text"):
        list(find(path).documents())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"caf\xe9", "utf-8"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-20], "end-of-stream"),
        ("a.txt.xz", b"no xz", "format"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-6], "end-of-stream"),
        ("a.txt.gz", b"no gz", "gzip"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2, is not JSON"),
        ("a.jsonl", b'["a"]', "line 1, is a list, not an object"),
        ("a.parquet", b"PAR1 and then nothing", "cannot be read"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(NestlingError, match=reason) as caught:
        list(find(tmp_path / name).documents())

    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    files = find(path)
    path.unlink()

    with pytest.raises(NestlingError, match=r"a.txt: cannot be read \(No such file or directory\)"):
        _ = files.fingerprint


# ---------------------------------------------------------------- what users' folders hold


def test_hidden_and_foreign_files_are_left_out_and_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a.jsonl", "__MACOSX/b.jsonl", "sub/c.jsonl"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(data / name, [{"text": name}])
    (data / "README.md").write_text("about")
    (data / ".DS_Store").write_bytes(b"\0")

    files = find(data)
    assert list(files.documents()) == ["a.jsonl", "sub/c.jsonl"]
    assert files.num_skipped == 5


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / ".hidden.jsonl", [{"text": "mine"}])
    assert list(find(path).documents()) == ["mine"]


def test_a_glob_leaves_folders_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "folder").mkdir()
    assert list(find(f"{tmp_path}/*").documents()) == ["a"]


def test_a_folder_of_very_many_files_says_what_it_is_doing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MANY_FILES", 3)
    for number in range(8):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "a.txt").write_text("a")
    assert len(files.files_below(tmp_path, "data.valid")[0]) == 8
    (line,) = caplog.messages
    assert line.startswith(f"data.valid={tmp_path}: 3 files looked at so far, 3 of them text; give")


def test_linked_folders_are_entered_once_and_circles_end(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write_jsonl(outside / "b.jsonl", [{"text": "b"}])
    data = tmp_path / "data"
    data.mkdir()
    write_jsonl(data / "a.jsonl", [{"text": "a"}])
    (data / "linked").symlink_to(outside)
    (data / "again").symlink_to(outside)
    (outside / "round").symlink_to(data)
    assert sorted(find(data).documents()) == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.TXT", "a.txt.gz", "a.jsonl.bz2", "a.json.xz"]
)
def test_a_byte_order_mark_is_as_if_it_were_not_there(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + (b"hello" if ".txt" in name.lower() else b'{"text": "hello"}\n')
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    path = tmp_path / name
    path.write_bytes(pack.get(path.suffix, bytes)(content))
    assert list(find(path).documents()) == ["hello"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.ndjson.ZST", "a.NDJSON", "a.json.gz"])
def test_other_endings_that_corpora_come_in_are_read(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n'
    path = tmp_path / name
    if name.lower().endswith(".zst"):
        content = pa.Codec("zstd").compress(content, asbytes=True)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(find(path).documents()) == ["one", "two"]


def test_a_json_file_may_be_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": None}, {"text": "two"}], indent=2))
    assert list(find(path).documents()) == ["one", "two"]
    path.write_text('[{"text": "one"}, 3]')
    with pytest.raises(NestlingError, match=r"a.json, item 2, is a int, not an object"):
        list(find(path).documents())
    path.write_text("[1")
    with pytest.raises(NestlingError, match=r"a.json is not JSON .*repair it"):
        list(find(path).documents())


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "1" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(NestlingError, match=r"line 1, is not JSON"):
        list(find(path).documents())


def test_a_separator_inside_a_line_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>two\n<|endoftext|>\nthree")
    assert list(find(path).documents()) == ["one<|endoftext|>two", "three"]
    assert "data.separator='<|endoftext|>' stands inside 1 lines of" in caplog.text


def test_an_error_about_the_text_field_names_what_the_command_takes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "one"}])
    with pytest.raises(UsageError, match=r"^--text-field='text': .*it has: content"):
        list(find(path, key="--data").documents())
    with pytest.raises(UsageError, match=r"^data.text_field='text': "):
        list(find(path, key="data.valid").documents())
