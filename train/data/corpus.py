"""A corpus is a stream of documents; this is the door to every kind of it.

    stdlib                          the source of the Python standard library on this disk
    FILE, FOLDER or GLOB            .txt, .jsonl, .json (also .gz, .xz, .bz2, .zst) and .parquet
    owner/name, hub:owner/name:config@split    a dataset on the Hugging Face hub
    hub:FOLDER                      a folder as `datasets` itself reads it

Every kind gives the same few things: a fingerprint of its content, its licence, and its documents in
an order that never changes.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from models.base.errors import UsageError
from train.data.conversations import checked_messages
from train.data.documents import checked_text
from train.data.files import find_files, kind_of
from train.data.hub import HubDataset
from train.data.standard_library import StandardLibrary

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?(@\S+)?")


class Corpus(Protocol):
    """Documents and what must be known about them."""

    @property
    def source(self) -> str:
        """The name or path that opens the corpus."""

    @property
    def licence(self) -> str:
        """The licence as far as it is known; shown in the provenance of whatever is trained."""

    @property
    def num_skipped(self) -> int:
        """Files left out: hidden ones, other kinds, and in `stdlib` those that are not UTF-8."""

    @property
    def num_bytes(self) -> int | None:
        """Size of the text, for progress bars; None where only reading would tell."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the content: equal content, equal fingerprint, wherever it lies."""

    def documents(self) -> Iterator[str]:
        """Yield all documents that are not blank, in a fixed order."""


def open_corpus(
    source: str,
    *,
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    cache_dir: Path | None = None,
    key: str = "data.source",
    messages_field: str | None = None,
) -> Corpus:
    """Open the corpus that `source` names; documents are read later, as a stream.

    Args:
        source: as in the list on top.
        text_field: the field of .jsonl, .parquet and datasets that holds the text.
        separator: the line that separates documents in .txt.
        cache_dir: folder of downloads; None is the default of `datasets`.
        key: name in errors of the setting that `source` came from.
        messages_field: the field that holds a conversation, which is read in place of text.

    Raises:
        UsageError: if there is no such file, folder, kind of file, dataset or field.
        NestlingError: if the hub cannot be reached.
    """
    field, check = messages_field or text_field, checked_messages if messages_field else checked_text
    if source == "stdlib":
        if messages_field:
            raise UsageError(
                f"data.messages_field={messages_field}: {key}=stdlib has none; give .jsonl files"
            )
        return StandardLibrary.on_this_disk()
    if source.startswith("hub:"):
        return HubDataset.load(source[4:], text_field=field, cache_dir=cache_dir, key=key, check=check)
    if looks_like_hub_name(source) and not Path(source).exists():
        return HubDataset.load(source, text_field=field, cache_dir=cache_dir, key=key, check=check)
    return find_files(
        source, text_field=field, separator=separator, cache_dir=cache_dir, key=key, check=check
    )


class Reading(TypedDict, total=False):
    """Settings of how files are read, as arguments of `open_corpus`."""

    text_field: str
    separator: str


def as_trained(provenance: Mapping[str, Any], text_field: str | None = None) -> Reading:
    """Return how a model's own text was read, for a member its family's, as arguments of `open_corpus`.

    Args:
        provenance: of a model folder.
        text_field: is taken instead, if it is given.

    >>> as_trained({"parent_provenance": {"recipe": {"data": {"text_field": "content"}}}})
    {'text_field': 'content'}
    """
    while isinstance(provenance.get("parent_provenance"), Mapping):
        provenance = provenance["parent_provenance"]
    recipe = provenance.get("recipe")
    data = recipe.get("data") if isinstance(recipe, Mapping) else None
    settings = data if isinstance(data, Mapping) else {}
    reading = Reading()
    if isinstance(field := text_field or settings.get("text_field"), str):
        reading["text_field"] = field
    if isinstance(separator := settings.get("separator"), str):
        reading["separator"] = separator
    return reading


def take_documents(corpus: Corpus, max_documents: int | None) -> Iterator[str]:
    """Return the first `max_documents` documents; all of them for None."""
    return itertools.islice(corpus.documents(), max_documents)


def looks_like_hub_name(source: str) -> bool:
    """Return whether a source that is no path here can be a name on the hub.

    >>> looks_like_hub_name("roneneldan/TinyStories"), looks_like_hub_name("stories/train.txt")
    (True, False)
    """
    return HUB_NAME.fullmatch(source) is not None and not kind_of(Path(source))
