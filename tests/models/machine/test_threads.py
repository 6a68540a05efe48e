"""Each work gets the smallest number of threads that is about as fast as its best."""

import torch

from models.machine.threads import fastest_threads, thread_counts

SECONDS = {"scales": {1: 8.0, 2: 4.0, 4: 2.0}, "does not": {1: 2.0, 2: 1.95, 4: 3.0}}


def test_each_work_is_timed_with_each_number_and_torchs_own_comes_back() -> None:
    now, before = [0.0], torch.get_num_threads()

    def take(name: str) -> None:
        now[0] += SECONDS[name][torch.get_num_threads()]

    works = {name: lambda name=name: take(name) for name in SECONDS}
    found = fastest_threads(works, thread_counts(4), budget=0.0, clock=lambda: now[0])
    assert found == {"scales": 4, "does not": 1}
    assert torch.get_num_threads() == before


def test_one_number_needs_no_trial() -> None:
    def never() -> None:
        raise AssertionError

    assert fastest_threads({"work": never}, [1], budget=1.0) == {"work": 1}
