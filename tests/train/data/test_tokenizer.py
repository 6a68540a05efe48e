import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from models.base.errors import NestlingError, UsageError
from train.data.tokenizer import (
    END_OF_TEXT,
    TextTokenizer,
    cut_long_words,
    interruptible,
    load_tokenizer,
    train_bpe,
)


@given(st.text())
def test_any_text_comes_back_exactly(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.backend.encode(text).ids

    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == text


def test_training_twice_gives_the_same_tokenizer(stories: list[str]) -> None:
    first = train_bpe(stories, vocab_size=300)
    second = train_bpe(reversed(stories), vocab_size=300)

    assert first.sha256 == second.sha256


def test_the_vocabulary_has_the_size_asked_for_or_what_the_text_gives(stories: list[str]) -> None:
    assert train_bpe(stories, vocab_size=280).vocab_size == 280
    assert train_bpe(["ab"], vocab_size=1000).vocab_size == 258


def test_the_vocabulary_learns_the_words_of_the_corpus(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.backend.encode(" was").ids) == 1
    assert len(tokenizer.backend.encode(" xqz").ids) == 4


def test_a_vocabulary_without_room_for_bytes_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match=r"^data.vocab_size=256: .* at least 257$"):
        train_bpe(["text"], vocab_size=256)


def test_transformers_loads_what_was_saved(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, model_max_length=64)
    text = "Once there was a cat.\n\tThé  end 🌳"

    theirs = AutoTokenizer.from_pretrained(tmp_path)

    assert theirs(text)["input_ids"] == tokenizer.backend.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eos_token_id, tokenizer.vocab_size)
    assert theirs.model_max_length == 64


def test_a_saved_tokenizer_opens_by_folder_and_by_file(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)

    for source in (tmp_path, tmp_path / "tokenizer.json"):
        ours = load_tokenizer(str(source))
        assert (ours.sha256, ours.eos_token) == (tokenizer.sha256, END_OF_TEXT)


def save_words(folder: Path, words: list[str]) -> Path:
    """A tokenizer of somebody else."""
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("eos", ["stop", {"content": "stop", "lstrip": False}])
def test_the_end_token_is_the_one_that_the_folder_names(tmp_path: Path, eos: object) -> None:
    save_words(tmp_path, ["a", "</s>", "stop"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))

    assert load_tokenizer(str(tmp_path)).eos_token_id == 2


def test_without_a_name_a_common_end_token_is_found(tmp_path: Path) -> None:
    assert load_tokenizer(str(save_words(tmp_path, ["a", "</s>"]))).eos_token == "</s>"


def test_no_end_token_is_wrong_usage(tmp_path: Path) -> None:
    save_words(tmp_path, ["a", "b"])

    with pytest.raises(UsageError, match=r"^data.tokenizer=.*no token that ends a text .*</s>"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')

    with pytest.raises(NestlingError, match=r"tokenizer.json is not a tokenizer") as caught:
        load_tokenizer(str(tmp_path))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nobody/nothing", "/none/at/all", "./none"])
def test_a_missing_tokenizer_is_wrong_usage(source: str) -> None:
    with pytest.raises(UsageError, match=f"^data.tokenizer='{source}': no tokenizer there") as it:
        load_tokenizer(source)

    assert "\n" not in str(it.value)


@pytest.mark.parametrize(
    "run", ["\0" * 1_000_000, " " * 1_000_000, "ACGT" * 250_000, "0123456789" * 100_000, "\n" * 1_000_000]
)
def test_long_runs_of_characters_are_trained_on_in_seconds(run: str) -> None:
    started = time.process_time()
    trained = train_bpe([f"the cat {run} sat"], vocab_size=300)
    assert time.process_time() - started < 20
    ids = trained.backend.encode(run).ids
    assert trained.backend.decode(ids) == run
    assert time.process_time() - started < 40


def test_texts_without_long_runs_are_trained_on_as_they_are() -> None:
    text = "the cat sat on the mat " * 500
    assert list(cut_long_words(text)) == [text]
    cut = list(cut_long_words("a" * 2500 + " b"))
    assert ("".join(cut), [len(part) for part in cut]) == ("a" * 2500 + " b", [1000, 1000, 502])


def test_a_signal_is_heard_while_merges_are_learned() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    heard, outlasted = threading.Event(), list[bool]()

    def learn() -> None:
        os.kill(os.getpid(), signal.SIGALRM)
        outlasted.append(not heard.wait(60))

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(learn)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert outlasted == []
    heard.set()


def test_what_fails_while_merges_are_learned_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
