import json
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from models.base.errors import NestlingError, UsageError
from train.data.corpus import open_corpus, take_documents
from train.data.hub import HubDataset
from train.data.standard_library import StandardLibrary


def test_stdlib_is_the_standard_library() -> None:
    assert isinstance(open_corpus("stdlib"), StandardLibrary)


def test_a_path_wins_over_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)

    assert list(open_corpus("owner/name").documents()) == ["one"]


def test_the_prefix_asks_for_datasets_itself(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "train.parquet")

    corpus = open_corpus(f"hub:{tmp_path}", cache_dir=tmp_path / "cache")

    assert isinstance(corpus, HubDataset)
    assert list(corpus.documents()) == ["one"]


def test_what_looks_like_a_name_is_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="nobody/nothing"):
        open_corpus("nobody/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize("source", ["none", "data/none.txt", "/none/at/all", ""])
def test_what_is_neither_path_nor_name_is_wrong_usage(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UsageError, match=f"^--data='{source}'"):
        open_corpus(source, key="--data")


def test_the_first_documents_can_be_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in "abc"))
    corpus = open_corpus(str(path))

    assert list(take_documents(corpus, 2)) == ["a", "b"]
    assert list(take_documents(corpus, None)) == ["a", "b", "c"]
