"""Text to train on: random words, so that a loss falls, and no further than it can."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

WORDS = "the cat sat on a mat and saw one dog run to its small house"


@pytest.fixture(scope="session")
def corpus_words() -> list[str]:
    return WORDS.split()


@pytest.fixture(scope="session")
def write_words(tmp_path_factory: pytest.TempPathFactory, corpus_words: list[str]) -> Callable[[int], Path]:
    """Write 60 documents of this many words; the same ones each time."""

    def write(count: int) -> Path:
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(0, len(corpus_words), (60, count), generator=generator).tolist()
        path = tmp_path_factory.mktemp("text") / "text.txt"
        path.write_text("\n<|endoftext|>\n".join(" ".join(corpus_words[i] for i in row) for row in picks))
        return path

    return write
