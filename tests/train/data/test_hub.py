from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from models.base.errors import NestlingError, UsageError
from train.data.hub import HubDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as it lies on the hub: a card and a parquet file per split, no script."""
    path = tmp_path / "dataset"
    (path / "data").mkdir(parents=True)
    splits: dict[str, list[str | None]] = {"train": ["one", None, "two"], "test": ["three"]}
    for split, texts in splits.items():
        table = pa.table({"text": texts, "id": list(range(len(texts)))})
        pq.write_table(table, path / "data" / f"{split}-00000-of-00001.parquet")
    return path


def load(name: str, cache_dir: Path, text_field: str = "text") -> HubDataset:
    return HubDataset.load(name, text_field=text_field, cache_dir=cache_dir, key="data.source")


def test_a_split_gives_its_documents_and_leaves_its_cache_in_our_folder(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    assert list(load(str(folder), cache).documents()) == ["one", "two"]
    assert list(load(f"{folder}@test", cache).documents()) == ["three"]
    assert list((cache / "datasets").rglob("*.arrow"))


def test_the_fingerprint_follows_the_documents(folder: Path, tmp_path: Path) -> None:
    first = load(str(folder), tmp_path / "one").fingerprint

    assert load(str(folder), tmp_path / "two").fingerprint == first
    assert load(f"{folder}@test", tmp_path / "two").fingerprint != first


@pytest.mark.parametrize("name", ["{}@nosplit", "{}:noconfig", "{}/none"])
def test_what_is_not_there_is_wrong_usage(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^data.source='.*': .*; give a path, or owner/name") as it:
        load(name.format(folder), tmp_path / "cache")

    assert "\n" not in str(it.value)


def test_a_missing_field_names_those_that_exist(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"text_field='body'.*: text, id$"):
        load(str(folder), tmp_path / "cache", text_field="body")


def test_a_name_that_cannot_be_reached_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match=r"^data.source='nobody/nothing': ") as caught:
        load("nobody/nothing", tmp_path / "cache")

    assert "\n" not in str(caught.value)


def test_a_damaged_dataset_is_an_error_of_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")

    with pytest.raises(NestlingError, match=r"^data.source=") as caught:
        load(str(folder), tmp_path / "cache")

    assert "\n" not in str(caught.value)
