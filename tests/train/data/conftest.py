"""A small tokenizer and a small corpus on disk, shared by the tests of train/data."""

from pathlib import Path

import pytest

from train.data.tokenizer import TextTokenizer, train_bpe

STORIES = [
    f"Once there was a {animal} that liked {food}.\nThe {animal} ate {number} of them.\n"
    for number in range(5)
    for animal in ("cat", "dog", "owl")
    for food in ("apples", "plums")
]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """A byte-level BPE with a few merges."""
    return train_bpe(STORIES, vocab_size=300)


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """Thirty short documents."""
    return STORIES


@pytest.fixture
def stories_txt(tmp_path: Path) -> Path:
    """The stories as a .txt file."""
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in STORIES), encoding="utf-8")
    return path
