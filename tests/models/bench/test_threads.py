"""The number of threads is chosen by the engine's own decoding."""

from collections.abc import Callable, Sequence

import torch

from models.bench.engines import Sample
from models.bench.threads import NUM_TOKENS, engine_threads


class Watcher:
    """Remembers with how many threads it was called, and how much it had to do."""

    def __init__(self, make_sample: Callable[..., Sample]) -> None:
        self.make_sample = make_sample
        self.calls: list[tuple[int, int]] = []

    def decode(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Sample:
        self.calls.append((torch.get_num_threads(), len(prompt_ids) + max_new_tokens))
        return self.make_sample()


def test_each_number_is_tried_and_the_callers_comes_back(make_sample: Callable[..., Sample]) -> None:
    engine = Watcher(make_sample)
    assert engine_threads(engine, 2, context=20) in (1, 2)
    assert {count for count, _ in engine.calls} == {1, 2}
    assert {length for _, length in engine.calls} == {20}
    assert torch.get_num_threads() == 1


def test_one_thread_needs_no_trial(make_sample: Callable[..., Sample]) -> None:
    engine = Watcher(make_sample)
    assert engine_threads(engine, 1, context=2 * NUM_TOKENS) == 1
    assert engine.calls == []
