"""Training leaves cores to other programs."""

from collections.abc import Iterator

import pytest
import torch

from models.base.processor import Load
from train.run.callbacks.threads import Threads


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_follow_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.callbacks.threads.usable_cores", lambda: 4)
    # Others take nothing, two of four cores, all of them, nothing.
    loads = iter([Load(0, 0), Load(0, 40), Load(20, 80), Load(60, 120), Load(60, 160)])
    one = Threads(3, load=lambda: next(loads))
    seen = []
    for _ in range(4):
        one.look()
        seen.append(torch.get_num_threads())
    assert seen == [3, 2, 1, 3]
