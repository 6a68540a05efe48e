"""Prompt lookup: what it copies, when it has nothing, and that its index only ever sees new tokens."""

import random
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch

from models.decode.engine.engine import stream
from models.decode.engine.lookup import LookupDraft
from models.decode.engine.scheduler import run_steps
from models.decode.engine.state import State
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import Proposal, Sampler, make_sampler
from models.decode.sampling.verifiers import VERIFIERS
from models.elastic.model import ElasticLM

NO_SAMPLER = cast("Sampler", None)  # nothing is drawn


StateOf = Callable[[Sequence[int]], State]


@pytest.fixture
def state_of(tiny_model: ElasticLM) -> StateOf:
    cache = tiny_model.new_cache(64)
    return lambda ids: State(list(ids), cache)


def proposed(state: State, num_tokens: int = 4, draft: LookupDraft | None = None) -> list[int]:
    return run_steps((draft or LookupDraft()).propose(state, num_tokens, NO_SAMPLER)).ids


def searched(ids: Sequence[int], num_tokens: int) -> list[int]:
    """The same by a search through the whole text."""
    for length in range(4, 1, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if list(ids[end - length : end]) == list(ids[-length:]) and len(ids) > length:
                text = list(ids)
                for place in range(num_tokens):
                    text.append(text[end + place])
                return text[len(ids) :]
    return []


def test_what_followed_the_last_tokens_before_is_proposed(state_of: StateOf) -> None:
    assert proposed(state_of([1, 2, 3, 4, 5, 6, 9, 2, 3])) == [4, 5, 6, 9]
    assert proposed(state_of([1, 2, 3, 4, 9, 2, 3]), 1) == [4]


def test_the_longest_ending_goes_first_and_then_the_latest_place(state_of: StateOf) -> None:
    assert proposed(state_of([7, 2, 3, 4, 8, 2, 3, 5, 7, 2, 3]), 1) == [4]  # 7 2 3 before 2 3
    assert proposed(state_of([2, 3, 4, 8, 2, 3, 5, 7, 2, 3]), 1) == [5]


def test_a_repeating_text_is_continued_beyond_its_end(state_of: StateOf) -> None:
    assert proposed(state_of([1, 2, 3, 1, 2, 3, 1, 2]), 8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert proposed(state_of([5, 5, 5]), 4) == [5, 5, 5, 5]


@pytest.mark.parametrize("ids", [[1], [1, 2], [1, 2, 3], [1, 2, 3, 2], [4, 1, 5, 1]])
def test_without_an_earlier_occurrence_it_has_nothing(ids: list[int], state_of: StateOf) -> None:
    assert proposed(state_of(ids)) == []
    assert LookupDraft().room(state_of(ids)) == 0


def test_the_index_finds_what_a_search_of_the_text_finds(state_of: StateOf) -> None:
    generator = random.Random(3)
    draft, found = LookupDraft(), 0
    state = state_of([generator.randrange(4)])
    for _ in range(300):
        theirs = searched(state.ids, 5)
        assert proposed(state, 5, draft) == theirs
        assert bool(draft.room(state)) == bool(theirs)
        found += bool(theirs)
        state.ids += [generator.randrange(4) for _ in range(generator.randrange(1, 4))]
    assert 200 < found < 300


def test_only_new_tokens_are_indexed(state_of: StateOf) -> None:
    class Counting(list[int]):
        """Counts how many tokens are read as slices."""

        num_read = 0

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            item = super().__getitem__(index)
            Counting.num_read += len(item) if isinstance(index, slice) else 1
            return item

    state, draft = state_of([]), LookupDraft()
    state.ids = Counting(range(1000))
    draft.room(state)
    state.ids += [1, 2]
    Counting.num_read = 0
    assert proposed(state, 3, draft) == [3, 4, 5]
    assert Counting.num_read < 60


def test_it_may_serve_another_text(state_of: StateOf) -> None:
    draft = LookupDraft()
    assert proposed(state_of([1, 2, 3, 9, 1, 2]), 1, draft) == [3]
    assert proposed(state_of([1, 2, 4, 9, 1, 2]), 1, draft) == [4]
    assert proposed(state_of([1, 2]), 1, draft) == []


@pytest.mark.parametrize("verifier", [*VERIFIERS, "coupled"])
def test_a_copied_token_overlaps_with_the_distribution_by_its_own_probability(verifier: str) -> None:
    p_TV = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]], dtype=torch.float64)
    for seed in range(10):
        sampler = make_sampler(SamplingParams(temperature=1.0), SeededRandom(seed), verifier)
        verification = sampler.verify(p_TV.log(), Proposal([0], [1, 2]))
        assert verification.overlaps == pytest.approx([0.3, 0.7][: len(verification.kept)])


def test_a_text_that_repeats_itself_is_written_in_few_passes(tiny_model: ElasticLM) -> None:
    plain = [token.id for token in stream(tiny_model, [3, 1, 4], max_new_tokens=60)]
    tokens = stream(tiny_model, [3, 1, 4], draft=LookupDraft(), gamma=6, max_new_tokens=60)
    assert [token.id for token in tokens] == plain
    assert tokens.report.accepted > 20
    assert tokens.report.rounds < 40
