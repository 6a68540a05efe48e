"""Documents to tokens, once: streams on disk, keyed by the content that they were made from.

    eos d1 d1 d1 eos d2 d2 eos ...      train.npy, valid.npy: uint16 where the vocabulary allows

Every document is followed by eos; the leading eos lets a document's first token be predicted too.
Tokenizing runs on all cores (Rust threads of `tokenizers`) and in bounded memory.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer

from models.base.errors import NestlingError
from models.base.files import read_json
from models.base.progress import progress_bar
from models.checkpoint.folder import ModelFolder
from models.checkpoint.tokenizer import for_bare_text
from train.data.cache import MANIFEST, build_once, content_key
from train.data.conversations import ChatFormat, encode_conversations
from train.data.corpus import Corpus, as_trained, open_corpus, take_documents
from train.data.documents import PIECE_CHARS, is_validation, split_into_pieces
from train.data.pack import Rows
from train.data.stream import Stream, StreamWriter, stream_dtype
from train.data.tokenizer import TextTokenizer, load_tokenizer

FORMAT = 1
"""Raise it when the same content would give other files."""

BATCH_CHARS = 1 << 21


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenized corpus.

    Args:
        train: the training stream, memory-mapped.
        valid: the validation stream; only an eos where nothing was held out.
        facts: num_documents, num_valid_documents, num_chars.
        sha256: hash of both streams, whatever they were made from.
        train_labels, valid_labels: which tokens are learned, of conversations.
    """

    train: Stream
    valid: Stream
    facts: dict[str, Any]
    sha256: str
    train_labels: NDArray[np.bool_] | None = None
    valid_labels: NDArray[np.bool_] | None = None


def tokenize(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    *,
    cache_dir: Path,
    valid_fraction: float = 0.0,
    max_documents: int | None = None,
    console: Console | None = None,
    key: str = "data.source",
    chat: ChatFormat | None = None,
) -> Tokens:
    """Tokenize a corpus, or open what an earlier run left.

    Args:
        corpus: documents.
        tokenizer: any.
        cache_dir: folder of the streams.
        valid_fraction: fraction of the documents to hold out, by content hash.
        max_documents: use only this many, the first.
        console: for a bar.
        key: name in errors of the setting.
        chat: how conversations are written; None: the documents are texts.

    Raises:
        NestlingError: if there is no text in it.
    """
    name = content_key(
        FORMAT, PIECE_CHARS, corpus.fingerprint, tokenizer.sha256, tokenizer.eos_token_id,
        valid_fraction, max_documents, *([] if chat is None else dataclasses.astuple(chat)),
    )  # fmt: skip
    folder = cache_dir / f"tokens-{name}"

    def build(partial: Path) -> dict[str, Any]:
        documents = take_documents(corpus, max_documents)
        total = None if max_documents else corpus.num_bytes
        with progress_bar("tokenizing", total and total / 1e6, console=console, unit=" MB") as bar:
            write = write_streams if chat is None else functools.partial(write_conversations, chat=chat)
            counts = write(
                partial,
                documents,
                tokenizer,
                valid_fraction=valid_fraction,
                advance=lambda chars: bar.advance(chars / 1e6),
            )
        if counts["num_documents"] == 0:
            raise no_text(key, corpus.source)
        return counts

    facts = build_once(folder, build)
    train, valid = (np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "valid"))
    sealed = read_json(folder / MANIFEST)["files"]
    tokens = Tokens(train=train, valid=valid, facts=facts, sha256=content_key(sealed))
    if chat is None:
        return tokens
    labels = [np.load(folder / f"{side}_labels.npy", mmap_mode="r") for side in ("train", "valid")]
    return dataclasses.replace(tokens, train_labels=labels[0], valid_labels=labels[1])


def write_streams(
    folder: Path,
    documents: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    valid_fraction: float,
    advance: Callable[[int], None],
) -> dict[str, int]:
    """Write train.npy and valid.npy in one pass over the documents; return what was counted."""
    dtype, eos = stream_dtype(tokenizer.vocab_size), tokenizer.eos_token_id
    num_documents = num_valid = num_chars = 0
    with (
        StreamWriter(folder / "train.npy", dtype, eos) as train,
        StreamWriter(folder / "valid.npy", dtype, eos) as valid,
    ):
        for piece, ids in encode(cut(documents, valid_fraction), tokenizer):
            (valid if piece.is_validation else train).write(ids)
            num_documents += piece.ends_document
            num_valid += piece.ends_document and piece.is_validation
            num_chars += len(piece.text)
            advance(len(piece.text))
    return {
        "num_documents": num_documents,
        "num_valid_documents": num_valid,
        "num_chars": num_chars,
    }


def write_conversations(
    folder: Path,
    documents: Iterable[str],
    tokenizer: TextTokenizer,
    *,
    valid_fraction: float,
    advance: Callable[[int], None],
    chat: ChatFormat,
) -> dict[str, int]:
    """Write the streams as `write_streams` does, and beside each which of its tokens are learned."""
    dtype, eos = stream_dtype(tokenizer.vocab_size), tokenizer.eos_token_id
    counts = {"num_documents": 0, "num_valid_documents": 0, "num_chars": 0}
    with (
        StreamWriter(folder / "train.npy", dtype, eos) as train,
        StreamWriter(folder / "valid.npy", dtype, eos) as valid,
        StreamWriter(folder / "train_labels.npy", np.bool_, 0) as train_labels,
        StreamWriter(folder / "valid_labels.npy", np.bool_, 0) as valid_labels,
    ):
        for one in encode_conversations(documents, tokenizer, chat, valid_fraction):
            (valid if one.is_validation else train).write(one.ids)
            (valid_labels if one.is_validation else train_labels).write(one.is_label)
            counts["num_documents"] += 1
            counts["num_valid_documents"] += one.is_validation
            counts["num_chars"] += one.num_chars
            advance(one.num_chars)
    return counts


def load_rows(
    source: str,
    tokenizer: TextTokenizer,
    *,
    sequence_length: int,
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    max_documents: int | None = None,
    key: str = "--data",
) -> Rows:
    """Return the rows of a text to measure on, tokenized in memory and kept nowhere.

    Args:
        source: anything that `open_corpus` takes.
        tokenizer: the model's.
        sequence_length: positions in a row.
        text_field: the field that holds the text.
        separator: the line that separates documents in .txt.
        max_documents: use only this many, the first.
        key: name in errors of the setting that `source` came from.

    Raises:
        UsageError: if nothing is there.
        NestlingError: if a file cannot be read, or there is no text in it.
    """
    corpus = open_corpus(source, text_field=text_field, separator=separator, key=key)
    pieces = cut(take_documents(corpus, max_documents), valid_fraction=0.0)
    parts = [ids for _, ids in encode(pieces, tokenizer)]
    if not parts:
        raise no_text(key, source)
    eos = np.array([tokenizer.eos_token_id], stream_dtype(tokenizer.vocab_size))
    return Rows(stream=np.concatenate([eos, *parts]), sequence_length=sequence_length)


def load_rows_for(
    folder: ModelFolder, source: str, *, longest: int, text_field: str | None = None, key: str = "MODEL"
) -> Rows:
    """Return the rows of a text to measure a model on, read as the model's own text was; see `load_rows`.

    Args:
        folder: the model, with its tokenizer.
        source: anything that `open_corpus` takes.
        longest: most positions in a row; the model's context may hold fewer.
        text_field: the field that holds the text; None is the one that the model was trained on.
        key: what an error calls the model.
    """
    return load_rows(
        source,
        load_tokenizer(str(folder.path), key=key),
        sequence_length=min(folder.model.config.max_position_embeddings, longest),
        **as_trained(folder.provenance, text_field),
    )


def no_text(key: str, source: str) -> NestlingError:
    """Return the error of a corpus without a document."""
    return NestlingError(f"{key}={source!r}: no text in it; give files that hold some")


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    is_validation: bool
    ends_document: bool


def cut(documents: Iterable[str], valid_fraction: float) -> Iterator[Piece]:
    """Decide each document's side and cut it where it is long."""
    for text in documents:
        side = is_validation(text, valid_fraction)
        length = 0
        for part in split_into_pieces(text):
            length += len(part)
            yield Piece(part, side, length == len(text))


def encode(pieces: Iterable[Piece], tokenizer: TextTokenizer) -> Iterator[tuple[Piece, Stream]]:
    """Yield the tokens of each piece, with eos where a document ends."""
    # The library warns at a later fork (a loader's worker) that threads were in use, unless this is
    # set; the workers never tokenize.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dtype, eos = stream_dtype(tokenizer.vocab_size), tokenizer.eos_token_id
    backend = plain_copy(tokenizer.backend)
    for batch in batches(pieces):
        encodings = backend.encode_batch_fast([p.text for p in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            ids = [*encoding.ids, eos] if piece.ends_document else encoding.ids
            yield piece, np.array(ids, dtype)


def plain_copy(backend: Tokenizer) -> Tokenizer:
    """Return a copy that keeps all tokens, and to which a special token's name in a text is only text."""
    copy = for_bare_text(backend)
    copy.encode_special_tokens = True
    return copy


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces up to BATCH_CHARS characters."""
    batch: list[Piece] = []
    num_chars = 0
    for piece in pieces:
        batch.append(piece)
        num_chars += len(piece.text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
