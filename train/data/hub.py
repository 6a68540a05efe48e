"""Documents through Hugging Face `datasets`: a name on the hub, or a folder as `datasets` reads it.

`owner/name`, with `:config` and `@split` where needed (the split is `train` by default). What is
downloaded and unpacked stays under the cache folder. https://huggingface.co/docs/datasets
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.base.errors import NestlingError, UsageError
from train.data.documents import Check, checked_text, field_setting, hash_documents, require_field

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset  # type: ignore[import-untyped]


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """One split of a dataset, memory-mapped by `datasets`.

    Args:
        source: as the user gave it.
        table: the split.
        text_field: the column that holds the text.
        num_skipped: always 0.
        num_bytes: not known.
    """

    source: str
    table: "Dataset"
    text_field: str
    num_skipped: int = 0
    num_bytes: int | None = None
    check: Check = checked_text
    field_setting: str = "data.text_field"

    @staticmethod
    def load(
        name: str, *, text_field: str, cache_dir: Path | None, key: str, check: Check = checked_text
    ) -> "HubDataset":
        """Download, or find in the cache, what `name[:config][@split]` says.

        Raises:
            UsageError: if there is no such dataset, config, split or field.
            NestlingError: if the hub cannot be reached, or the files are damaged.
        """
        from datasets import Dataset, load_dataset
        from datasets.exceptions import (  # type: ignore[import-untyped]
            DatasetGenerationError,
        )

        quiet_datasets()
        path, config, split = parse_name(name)
        if not path or name.endswith((":", "@")):
            raise UsageError(f"{key}={name!r}: a part of it is empty; write owner/name[:config][@split]")
        try:
            table = load_dataset(path, config, split=split, cache_dir=datasets_folder(cache_dir))
        except (ConnectionError, DatasetGenerationError) as error:
            raise NestlingError(
                f"{key}={name!r}: {one_line(error)}; check the connection, or give a local path"
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{key}={name!r}: {one_line(error)}; give a path, or owner/name[:config][@split]"
            ) from error
        assert isinstance(table, Dataset), type(table)
        setting = field_setting(key, messages=check is not checked_text)
        require_field(table.column_names, text_field, name, setting)
        return HubDataset(source=name, table=table, text_field=text_field, check=check, field_setting=setting)

    @property
    def licence(self) -> str:
        """The licence that the dataset names."""
        return self.table.info.license or f"see the card of {self.source}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the documents."""
        return hash_documents(self.documents())

    def documents(self) -> Iterator[str]:
        """Yield the text column; nulls and blanks are no documents."""
        for batch in self.table.select_columns([self.text_field]).iter(batch_size=256):
            for value in batch[self.text_field]:
                if value is None:
                    continue
                text = self.check(value, self.text_field, self.source, self.field_setting)
                if text.strip():
                    yield text


def stream_parquet(path: Path, cache_dir: Path | None) -> "IterableDataset":
    """Return a local parquet file as a stream, which is never copied."""
    from datasets import IterableDataset, load_dataset

    quiet_datasets()
    table = load_dataset(
        "parquet",
        data_files=[str(path)],
        split="train",
        streaming=True,
        cache_dir=datasets_folder(cache_dir),
    )
    assert isinstance(table, IterableDataset), type(table)
    return table


def parse_name(name: str) -> tuple[str, str | None, str]:
    """Return path, config and split of a dataset's name.

    >>> parse_name("Salesforce/wikitext:wikitext-2-raw-v1@test")
    ('Salesforce/wikitext', 'wikitext-2-raw-v1', 'test')
    >>> parse_name("roneneldan/TinyStories")
    ('roneneldan/TinyStories', None, 'train')
    """
    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    return path, config or None, split or "train"


def datasets_folder(cache_dir: Path | None) -> str | None:
    """Return the folder in which `datasets` keeps its files; None is its own default."""
    return None if cache_dir is None else str(cache_dir / "datasets")


def quiet_datasets() -> None:
    """Silence the log lines, which our error repeats in one, and the bars where there is no terminal."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def one_line(error: BaseException) -> str:
    """Return the error's text without line breaks."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
