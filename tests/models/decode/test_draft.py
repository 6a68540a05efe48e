from collections.abc import Callable

import pytest
import torch

from models.decode.chance import SeededRandom
from models.decode.choose import Chooser, Proposal, make_chooser
from models.decode.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine import stream
from models.decode.passes import settle
from models.decode.sampling import SamplingParams, law
from models.decode.state import State, new_cache, score
from models.elastic import ElasticLM
from models.errors import UsageError
from models.granularity import Granularity
from models.quantize import pack
from models.view import View

ModelMaker = Callable[..., ElasticLM]

WARM = SamplingParams(temperature=1.0)
LAW_ATOL = 1e-12  # float64


def settled(model: ElasticLM, ids: list[int]) -> State:
    state = State(list(ids), new_cache(model, 40))
    score(model, ids[:-1], state.cache, num_last=1)
    state.cache.commit(len(ids) - 1)
    return state


def warm_chooser(seed: int = 0) -> Chooser:
    return make_chooser(WARM, SeededRandom(seed), "token")


def propose(draft: Draft, state: State, num_tokens: int = 3, seed: int = 0) -> Proposal:
    return settle(draft.propose(state, num_tokens, warm_chooser(seed)))


def assert_drawn_from(model: ElasticLM | View, ids: list[int], proposal: Proposal) -> None:
    for position, q_V in enumerate(proposal.laws):
        tokens_BT = torch.tensor([ids + proposal.ids[:position]])
        theirs_V = law(model(tokens_BT)[0, -1], WARM)
        torch.testing.assert_close(q_V, theirs_V, rtol=0, atol=LAW_ATOL)


@pytest.fixture
def model(tiny_model: ElasticLM) -> ElasticLM:
    return tiny_model.double().requires_grad_(False)


def test_a_model_draft_follows_what_was_settled_whatever_was_accepted(model: ElasticLM) -> None:
    draft = ModelDraft(View(model, Granularity.parse("ffn=0.5,heads=0.5")))
    ids = [1, 2, 3, 4]
    for num_accepted in (0, 3, 1, 2, 3, 0):
        proposal = propose(draft, settled(model, ids), seed=num_accepted)
        assert_drawn_from(draft.model, ids, proposal)
        ids += [*proposal.ids[:num_accepted], 63]


def test_a_model_draft_may_serve_another_request(model: ElasticLM) -> None:
    draft = ModelDraft(View(model, Granularity.parse("ffn=0.5")))
    for ids in ([1, 2, 3, 4, 5, 6], [1, 2, 9], [7, 8], [7, 8], [1, 2, 9, 9, 9]):
        assert_drawn_from(draft.model, ids, propose(draft, settled(model, ids)))


def test_a_model_draft_with_a_shorter_context_proposes_what_fits_and_then_nothing(
    model: ElasticLM, make_model: ModelMaker
) -> None:
    draft = ModelDraft(make_model(vocab_size=64, max_position_embeddings=8))
    counts = [len(propose(draft, settled(model, list(range(length)))).ids) for length in range(5, 11)]
    assert counts == [3, 3, 2, 1, 0, 0]
    tokens = stream(model, [1, 2, 3], draft=draft, max_new_tokens=20)
    theirs = [token.id for token in stream(model, [1, 2, 3], max_new_tokens=20)]
    assert [token.id for token in tokens] == theirs


def test_a_nested_draft_that_is_the_target_draws_from_the_targets_laws(model: ElasticLM) -> None:
    ids = [1, 2, 3, 4]
    proposal = propose(NestedDraft(View(model, Granularity())), settled(model, ids))
    assert_drawn_from(model, ids, proposal)


def test_a_nested_draft_reads_the_targets_keys_and_values_of_what_is_settled(
    model: ElasticLM,
) -> None:
    view = View(model, Granularity.parse("layers=1:3"))
    state = settled(model, [1, 2, 3, 4])
    proposal = propose(NestedDraft(view), state)
    theirs_V = law(score(view, [4], state.cache.view(), num_last=1)[0], WARM)
    torch.testing.assert_close(proposal.laws[0], theirs_V, rtol=0, atol=LAW_ATOL)
    own_V = law(view(torch.tensor([[1, 2, 3, 4]]))[0, -1], WARM)
    assert (proposal.laws[0] - own_V).abs().max() > 1e-3


@pytest.mark.parametrize("precision", [None, "int8", "bf16"])
def test_a_nested_draft_leaves_the_settled_positions_alone(precision: str | None, model: ElasticLM) -> None:
    state = settled(model, [1, 2, 3, 4])
    before = [store.clone() for layer in range(4) for store in state.cache.read(layer)]
    member = model if precision is None else pack(model, precision)
    propose(NestedDraft(View(member, Granularity.parse("heads=0.5"))), state)
    after = [store for layer in range(4) for store in state.cache.read(layer)]
    assert state.cache.length == 3
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("text", ["full", "ffn=0.75", "ffn=0.25,layers=0-2"])
def test_a_nested_draft_larger_than_its_target_is_refused(text: str, model: ElasticLM) -> None:
    target = View(model, Granularity.parse("ffn=0.5,layers=0-1"))
    draft = NestedDraft(View(model, Granularity.parse(text)))
    with pytest.raises(UsageError, match=r"is larger than its target ffn=0\.5,layers=0-1"):
        stream(target, [1], draft=draft)


def test_a_model_draft_larger_than_its_target_is_refused(model: ElasticLM, make_model: ModelMaker) -> None:
    large = ModelDraft(make_model(vocab_size=64, hidden_size=64))
    with pytest.raises(UsageError, match=r"--draft has [\d,]+ parameters, more than its target's"):
        stream(model, [1], draft=large)


def test_a_draft_of_another_vocabulary_is_refused(model: ElasticLM, make_model: ModelMaker) -> None:
    other = ModelDraft(make_model(vocab_size=63))
    with pytest.raises(UsageError, match="vocabulary of 63 tokens and its target one of 64"):
        stream(model, [1], draft=other)
