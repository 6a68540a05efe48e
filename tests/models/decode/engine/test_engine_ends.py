"""The cache after every round, every way to end, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from models.base.errors import UsageError
from models.decode.engine.draft import Draft, NestedDraft, Prior
from models.decode.engine.engine import stream
from models.decode.engine.scheduler import Steps
from models.decode.engine.state import State
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import Proposal, Sampler
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import Model, View

MakeModel = Callable[..., ElasticLM]

GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.8, top_k=20, top_p=0.95)
# Keys and values of one pass over all positions and of passes over few differ in summation order.
CACHE_ATOL = 1e-12  # float64
GARBAGE = 1e4  # finite: a value that is never read cannot spread


def ids_of(model: Model, prompt: Sequence[int], **options: Any) -> list[int]:
    return [token.id for token in stream(model, prompt, **options)]


def nested(model: ElasticLM, text: str) -> NestedDraft:
    return NestedDraft(View(model, Granularity.parse(text)))


# ---------------------------------------------------------------- what the cache holds


@dataclass
class Watched:
    """Calls `look` with the committed state before each round, and `after` once the draft has written."""

    draft: Draft
    look: Callable[[State], None]
    after: Callable[[State], None] = field(default=lambda _: None)
    rounds: int = 0

    prior = Prior()

    def check(self, target: Model) -> None:
        self.draft.check(target)

    def renew(self) -> Draft:
        return self

    def room(self, state: State) -> None:
        """Any number."""

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        self.rounds += 1
        self.look(state)
        proposal = yield from self.draft.propose(state, num_tokens, sampler)
        self.after(state)
        return proposal


@pytest.mark.parametrize("text", ["layers=0-1", "ffn=0.25,heads=0.5", "full"])
@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_before_every_round_the_cache_is_a_fresh_prefill(
    params: SamplingParams, text: str, tiny_model: ElasticLM
) -> None:
    model = tiny_model.double()

    def compare(state: State) -> None:
        assert state.cache.length == len(state.ids) - 1
        fresh = model.new_cache(len(state.ids))
        model.run([Request(state.ids[:-1], fresh, 1)])
        fresh.commit(len(state.ids) - 1)
        for layer in range(model.config.num_hidden_layers):
            for ours, theirs in zip(state.cache.read(layer), fresh.read(layer), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=CACHE_ATOL)

    draft = Watched(nested(model, text), compare)
    ids_of(model, [5, 6, 7], draft=draft, gamma=3, params=params, max_new_tokens=30)
    assert draft.rounds > 6


@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_garbage_in_the_tail_of_the_store_changes_nothing(
    params: SamplingParams, tiny_model: ElasticLM
) -> None:
    def spoil(state: State) -> None:
        everything = state.cache.view()
        everything.commit(everything.num_positions - everything.length)
        for layer in range(tiny_model.config.num_hidden_layers):
            for store_BGSK in everything.read(layer):
                store_BGSK[:, :, state.cache.length :] = GARBAGE

    clean = nested(tiny_model, "layers=0-2")
    spoiled = Watched(clean, look=spoil, after=spoil)
    options: dict[str, Any] = {"params": params, "gamma": 3, "max_new_tokens": 30}
    theirs = list(stream(tiny_model, [5, 6, 7], draft=clean, **options))
    assert list(stream(tiny_model, [5, 6, 7], draft=spoiled, **options)) == theirs
    assert spoiled.rounds > 6


# ---------------------------------------------------------------- how it ends


@pytest.mark.parametrize("text", ["full", "layers=0-2"])
def test_the_end_of_text_ends_the_output_wherever_in_a_block_it_falls(
    text: str, tiny_model: ElasticLM
) -> None:
    plain = ids_of(tiny_model, [3, 1, 4], max_new_tokens=16)
    for eos in set(plain):
        tokens = stream(
            tiny_model,
            [3, 1, 4],
            draft=nested(tiny_model, text),
            gamma=5,
            max_new_tokens=16,
            eos_token_ids=(eos, 63),
        )
        assert [token.id for token in tokens] == plain[: plain.index(eos) + 1]
        assert tokens.report.finish_reason == "eos"
        assert tokens.report.num_tokens == plain.index(eos) + 1


def test_the_models_own_end_of_text_is_used_unless_others_are_given(make_model: MakeModel) -> None:
    free = ids_of(make_model(vocab_size=32), [1], max_new_tokens=12)
    model = make_model(vocab_size=32, eos_token_id=free[3])
    assert ids_of(model, [1], max_new_tokens=12) == free[: free.index(free[3]) + 1]
    assert ids_of(model, [1], max_new_tokens=12, eos_token_ids=()) == free


@pytest.mark.parametrize("text", ["full", "layers=0-2"])
def test_the_length_limit_may_fall_anywhere_in_a_block(text: str, tiny_model: ElasticLM) -> None:
    plain = ids_of(tiny_model, [3, 1, 4], max_new_tokens=14)
    for limit in range(1, 15):
        tokens = stream(tiny_model, [3, 1, 4], draft=nested(tiny_model, text), gamma=4, max_new_tokens=limit)
        assert [token.id for token in tokens] == plain[:limit]
        assert tokens.report.finish_reason == "length"


@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_the_context_may_end_anywhere_in_a_block(params: SamplingParams, make_model: MakeModel) -> None:
    model = make_model(vocab_size=32, max_position_embeddings=16)
    draft = nested(model, "full")
    for length in range(1, 16):
        prompt = list(range(length))
        tokens = list(stream(model, prompt, draft=draft, gamma=4, params=params))
        assert len(prompt) + len(tokens) == 16
        if params.is_greedy:
            assert [token.id for token in tokens] == ids_of(model, prompt)


def test_who_stops_taking_tokens_cancels_and_the_report_counts_what_was_taken(
    tiny_model: ElasticLM,
) -> None:
    tokens = stream(tiny_model, [3, 1, 4], draft=nested(tiny_model, "full"), gamma=4)
    taken = [next(tokens) for _ in range(4)]
    report = tokens.report
    assert (report.num_tokens, report.accepted, report.rounds) == (4, 3, 1)
    assert [token.drafted for token in taken] == [False, True, True, True]
    assert report.finish_reason == ""


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([0] * 128, {}, "--prompt has 128 tokens, but the model's context holds 128"),
        ([], {}, "--prompt is empty"),
        ([1], {"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ([1], {"gamma": -1}, "--gamma must be 0 or more, got -1"),
        ([1], {"verifier": "tokens"}, "--verifier 'tokens' is not one of token, block, coupled"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_the_first_token(
    prompt: list[int], options: dict[str, Any], message: str, tiny_model: ElasticLM
) -> None:
    with pytest.raises(UsageError, match=message):
        stream(tiny_model, prompt, **options)


def test_decoding_builds_no_graph(tiny_model: ElasticLM) -> None:
    seen: list[Tensor] = []
    draft = Watched(nested(tiny_model, "layers=0"), lambda state: seen.extend(state.cache.read(0)))
    ids_of(tiny_model, [1, 2, 3], draft=draft, max_new_tokens=8)
    assert seen
    assert not any(tensor.requires_grad for tensor in seen)
