from pathlib import Path

import pytest

from models.base.errors import NestlingError
from train.data.standard_library import StandardLibrary


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "json/decoder.py": b"DECODER = 1\n",
        "abc.py": b"ABC = 1\n",
        "abc.txt": b"not source",
        "empty.py": b"\n",
        "latin.py": b"# -*- coding: latin-1 -*-\nNAME = '\xe9'\n",
        "test/test_abc.py": b"TEST = 1\n",
        "json/tests/test_decoder.py": b"TEST = 1\n",
        "site-packages/numpy/core.py": b"NUMPY = 1\n",
        "_sysconfigdata__linux_.py": b"MACHINE = 1\n",
        "config-3.11-x86_64/makesetup.py": b"MACHINE = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_source_is_read_in_order_without_tests_packages_and_machine_files(library: Path) -> None:
    corpus = StandardLibrary.on_this_disk(library)

    assert list(corpus.documents()) == ["ABC = 1\n", "DECODER = 1\n"]


def test_the_order_is_by_name_whatever_the_disk_says(tmp_path: Path) -> None:
    names = [f"m{number * 7 % 30:02d}" for number in range(30)]
    for name in names:
        (tmp_path / f"{name}.py").write_text(name)

    assert list(StandardLibrary.on_this_disk(tmp_path).documents()) == sorted(names)


def test_files_that_are_not_utf8_are_skipped_and_counted(library: Path) -> None:
    assert StandardLibrary.on_this_disk(library).num_skipped == 1


def test_the_fingerprint_follows_the_text_not_the_place(library: Path, tmp_path: Path) -> None:
    before = StandardLibrary.on_this_disk(library).fingerprint
    moved = library.rename(tmp_path.with_name("moved"))

    assert StandardLibrary.on_this_disk(moved).fingerprint == before
    (moved / "abc.py").write_text("ABC = 2\n")
    assert StandardLibrary.on_this_disk(moved).fingerprint != before


def test_this_python_has_megabytes_of_source_and_a_licence() -> None:
    corpus = StandardLibrary.on_this_disk()

    assert corpus.num_bytes > 5_000_000
    assert "PSF" in corpus.licence
    assert any("class JSONDecoder" in text for text in corpus.documents())


def test_a_python_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match=r"^data.source='stdlib': no Python source at .*$"):
        StandardLibrary.on_this_disk(tmp_path)
