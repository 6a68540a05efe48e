import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from models.base.errors import NestlingError
from train.data import tokens as tokens_module
from train.data.corpus import open_corpus
from train.data.documents import PIECE_CHARS, is_validation
from train.data.stream import StreamWriter
from train.data.tokenizer import END_OF_TEXT, TextTokenizer, train_bpe
from train.data.tokens import cut, encode, load_rows, tokenize


def documents_of(stream: np.ndarray, tokenizer: TextTokenizer) -> list[str]:
    """Undo tokenizing: split at eos, decode each part."""
    borders = np.flatnonzero(stream == tokenizer.eos_token_id)
    assert borders[0] == 0
    assert borders[-1] == len(stream) - 1
    return [
        tokenizer.backend.decode(stream[start + 1 : end].tolist(), skip_special_tokens=False)
        for start, end in itertools.pairwise(borders)
    ]


@given(st.lists(st.text(min_size=1)))
def test_no_document_is_lost_or_changed(tokenizer: TextTokenizer, texts: list[str]) -> None:
    parts = [ids for _, ids in encode(cut(texts, valid_fraction=0.0), tokenizer)]
    stream = np.concatenate([[tokenizer.eos_token_id], *parts])

    assert documents_of(stream, tokenizer) == texts


def test_both_sides_together_hold_every_document_once(
    stories: list[str], stories_txt: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    corpus = open_corpus(str(stories_txt))

    ours = tokenize(corpus, tokenizer, cache_dir=tmp_path, valid_fraction=0.3)

    held_out = [story for story in stories if is_validation(story, 0.3)]
    assert documents_of(ours.valid, tokenizer) == held_out
    assert documents_of(ours.train, tokenizer) == [s for s in stories if s not in held_out]
    assert ours.facts["num_documents"] == len(stories)
    assert ours.facts["num_valid_documents"] == len(held_out) > 0
    assert ours.facts["num_chars"] == sum(map(len, stories))
    assert ours.train.dtype == np.uint16


def test_the_name_of_a_special_token_in_a_text_stays_text(tokenizer: TextTokenizer) -> None:
    text = f"say {END_OF_TEXT} and go on"

    (_, ids), = encode(cut([text], valid_fraction=0.0), tokenizer)  # fmt: skip

    assert ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.backend.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_a_tokenizer_that_would_cut_texts_off_does_not(tokenizer: TextTokenizer) -> None:
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(2)
    short = TextTokenizer(backend=backend, eos_token=END_OF_TEXT, name="short")

    (_, ids), = encode(cut(["Once there was a cat"], valid_fraction=0.0), short)  # fmt: skip

    assert len(ids) > 3


def test_a_long_document_is_one_document(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    text = "one and two\n" * (PIECE_CHARS // 8)
    (tmp_path / "a.txt").write_text(text)

    rows = load_rows(str(tmp_path / "a.txt"), tokenizer, sequence_length=8)

    assert documents_of(rows.stream, tokenizer) == [text]


def test_batches_end_anywhere_without_effect(
    stories: list[str], tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = list(cut(stories, valid_fraction=0.0))
    whole = [ids.tolist() for _, ids in encode(pieces, tokenizer)]

    monkeypatch.setattr(tokens_module, "BATCH_CHARS", 100)

    assert [ids.tolist() for _, ids in encode(pieces, tokenizer)] == whole


def test_the_second_run_opens_what_the_first_one_wrote(
    stories_txt: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize(open_corpus(str(stories_txt)), tokenizer, cache_dir=tmp_path)
    moved = stories_txt.rename(tmp_path / "moved.txt")
    monkeypatch.setattr(tokens_module, "write_streams", None)  # any use would fail

    second = tokenize(open_corpus(str(moved)), tokenizer, cache_dir=tmp_path)

    assert np.array_equal(first.train, second.train)
    assert first.facts == second.facts


def test_other_content_and_other_settings_are_other_entries(
    stories_txt: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    def count(valid_fraction: float = 0.0, max_documents: int | None = None) -> int:
        tokenize(
            open_corpus(str(stories_txt)),
            tokenizer,
            cache_dir=tmp_path / "cache",
            valid_fraction=valid_fraction,
            max_documents=max_documents,
        )
        return len(list((tmp_path / "cache").glob("tokens-*/manifest.json")))

    assert count() == 1
    assert count(valid_fraction=0.3) == 2
    assert count(max_documents=3) == 3
    stories_txt.write_text("other text")
    assert count() == 4


def test_another_tokenizer_of_the_same_size_is_another_entry(
    stories: list[str], stories_txt: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    other = train_bpe(["completely different words"] * 9 + stories[:1], vocab_size=300)
    corpus = open_corpus(str(stories_txt))
    tokenize(corpus, tokenizer, cache_dir=tmp_path)

    ours = tokenize(corpus, other, cache_dir=tmp_path)

    assert documents_of(ours.train, other) == stories


def test_a_damaged_stream_is_written_again(
    stories_txt: Path, tokenizer: TextTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = open_corpus(str(stories_txt))
    whole = np.array(tokenize(corpus, tokenizer, cache_dir=tmp_path).train)
    (path,) = tmp_path.glob("tokens-*/train.npy")
    path.write_bytes(path.read_bytes()[:-2])

    again = tokenize(corpus, tokenizer, cache_dir=tmp_path).train

    assert np.array_equal(again, whole)
    assert "train.npy is not what was written" in caplog.text


@pytest.mark.parametrize("content", ["", "\n \n", "\n<|endoftext|>\n<|endoftext|>\n"])
def test_a_corpus_without_text_is_an_error_and_leaves_nothing(
    content: str, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(content)
    cache = tmp_path / "cache"

    with pytest.raises(NestlingError, match=r"^data.source='.*blank.txt': no text in it"):
        tokenize(open_corpus(str(path)), tokenizer, cache_dir=cache)
    with pytest.raises(NestlingError, match=r"^--data='.*blank.txt': no text in it"):
        load_rows(str(path), tokenizer, sequence_length=8)

    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_a_bar_on_a_terminal_changes_nothing(
    stories_txt: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    corpus = open_corpus(str(stories_txt))
    console = Console(force_terminal=True)

    with console.capture() as shown:
        ours = tokenize(corpus, tokenizer, cache_dir=tmp_path / "one", console=console)

    assert "tokenizing" in shown.get()
    plain = tokenize(corpus, tokenizer, cache_dir=tmp_path / "two")
    assert np.array_equal(ours.train, plain.train)


@given(st.lists(st.lists(st.integers(0, 2**32 - 1))))
def test_a_stream_written_in_pieces_is_a_npy_file(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("streams") / "stream.npy"

    with StreamWriter(path, np.uint32, eos=7) as writer:
        for piece in pieces:
            writer.write(np.array(piece, np.uint32))

    assert np.load(path, mmap_mode="r").tolist() == [7, *itertools.chain(*pieces)]
