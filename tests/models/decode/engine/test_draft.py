from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.base.errors import UsageError
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.engine import stream
from models.decode.engine.scheduler import Steps, run, run_steps
from models.decode.engine.state import State
from models.decode.sampling.params import SamplingParams, penalise, sampling_probs
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import Proposal, Sampler, make_sampler
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import View
from models.packed.quantize import pack

ModelMaker = Callable[..., ElasticLM]

WARM = SamplingParams(temperature=1.0)
LAW_ATOL = 1e-12  # float64


def committed(model: ElasticLM, ids: list[int]) -> State:
    state = State(list(ids), model.new_cache(40))
    model.run([Request(ids[:-1], state.cache, 1)])
    state.cache.commit(len(ids) - 1)
    return state


def warm_sampler(seed: int = 0) -> Sampler:
    return make_sampler(WARM, SeededRandom(seed), "token")


def propose(draft: Draft, state: State, num_tokens: int = 3, seed: int = 0) -> Proposal:
    return run_steps(draft.propose(state, num_tokens, warm_sampler(seed)))


def assert_drawn_from(model: ElasticLM | View, ids: list[int], proposal: Proposal) -> None:
    for position, q_V in enumerate(torch.cat(proposal.probs)):
        tokens_BT = torch.tensor([ids + proposal.ids[:position]])
        theirs_V = sampling_probs(model(tokens_BT)[0, -1], WARM)
        torch.testing.assert_close(q_V, theirs_V, rtol=0, atol=LAW_ATOL)


@pytest.fixture
def model(tiny_model: ElasticLM) -> ElasticLM:
    return tiny_model.double().requires_grad_(False)


def test_a_model_draft_follows_what_was_committed_whatever_was_accepted(model: ElasticLM) -> None:
    draft = ModelDraft(View(model, Granularity.parse("ffn=0.5,heads=0.5")))
    ids = [1, 2, 3, 4]
    for num_accepted in (0, 3, 1, 2, 3, 0):
        proposal = propose(draft, committed(model, ids), seed=num_accepted)
        assert_drawn_from(draft.model, ids, proposal)
        ids += [*proposal.ids[:num_accepted], 63]


def test_a_model_draft_may_serve_another_request(model: ElasticLM) -> None:
    draft = ModelDraft(View(model, Granularity.parse("ffn=0.5")))
    for ids in ([1, 2, 3, 4, 5, 6], [1, 2, 9], [7, 8], [7, 8], [1, 2, 9, 9, 9]):
        assert_drawn_from(draft.model, ids, propose(draft, committed(model, ids)))


def test_a_model_draft_with_a_shorter_context_proposes_what_fits_and_then_nothing(
    model: ElasticLM, make_model: ModelMaker
) -> None:
    draft = ModelDraft(make_model(vocab_size=64, max_position_embeddings=8))
    counts = [len(propose(draft, committed(model, list(range(length)))).ids) for length in range(5, 11)]
    assert counts == [3, 3, 2, 1, 0, 0]
    tokens = stream(model, [1, 2, 3], draft=draft, max_new_tokens=20)
    theirs = [token.id for token in stream(model, [1, 2, 3], max_new_tokens=20)]
    assert [token.id for token in tokens] == theirs


def test_a_nested_draft_that_is_the_target_draws_from_the_targets_distributions(model: ElasticLM) -> None:
    ids = [1, 2, 3, 4]
    proposal = propose(NestedDraft(View(model, Granularity())), committed(model, ids))
    assert_drawn_from(model, ids, proposal)


def test_a_nested_draft_reads_the_targets_keys_and_values_of_what_is_committed(
    model: ElasticLM,
) -> None:
    view = View(model, Granularity.parse("layers=1:3"))
    state = committed(model, [1, 2, 3, 4])
    proposal = propose(NestedDraft(view), state)
    theirs_V = sampling_probs(view.run([Request([4], state.cache.view(), 1)])[0], WARM)
    torch.testing.assert_close(proposal.probs[0][0], theirs_V, rtol=0, atol=LAW_ATOL)
    own_V = sampling_probs(view(torch.tensor([[1, 2, 3, 4]]))[0, -1], WARM)
    assert (proposal.probs[0] - own_V).abs().max() > 1e-3


@pytest.mark.parametrize("precision", [None, "int8", "int4", "q4_0", "bf16"])
def test_a_nested_draft_leaves_the_committed_positions_alone(precision: str | None, model: ElasticLM) -> None:
    state = committed(model, [1, 2, 3, 4])
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


@pytest.mark.parametrize("vocabulary", [None, [3, 9, 40, 41, 63]])
@pytest.mark.parametrize("precision", [None, "fp32"])
@torch.inference_mode()
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_greedy_draft_proposes_its_likeliest_tokens(
    vocabulary: list[int] | None, precision: str | None, penalty: float, tiny_model: ElasticLM
) -> None:
    model = tiny_model if precision is None else pack(tiny_model, precision)
    params = SamplingParams(repetition_penalty=penalty)
    allowed = range(64) if vocabulary is None else vocabulary
    view, ids = View(model, Granularity.parse("layers=0-1")), [1, 2, 3, 4]
    few = None if vocabulary is None else torch.tensor(vocabulary)
    together = [committed(model, ids[:length]) for length in (2, 4)]
    sampler = make_sampler(params, SeededRandom(0), "token")
    for state in together:
        alone = run_steps(NestedDraft(view, few).propose(state, 5, sampler)).ids
        text = list(state.ids)
        for _ in range(5):
            logits_V = penalise(view(torch.tensor([text]))[0, -1:], params, text)[0]
            text.append(max(allowed, key=lambda token: float(logits_V[token])))
        assert alone == text[-5:]


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", [None, [3, 9, 40, 41, 63]])
@pytest.mark.parametrize("verifier", ["greedy", "block", "coupled"])
def test_a_draft_chooses_in_one_pass_what_it_chooses_step_by_step(
    vocabulary: list[int] | None, verifier: str, tiny_model: ElasticLM
) -> None:
    """The same numbers draw the same tokens, alone and in a batch, from the same distributions."""
    packed, params = (
        pack(tiny_model, "fp32"),
        SamplingParams(temperature=0.0 if verifier == "greedy" else 1.0),
    )
    if not packed.can_draw:
        pytest.skip("needs a C compiler")
    few = None if vocabulary is None else torch.tensor(vocabulary)
    found: dict[ElasticLM, list[Proposal]] = {}
    for model in (tiny_model, packed):
        draft = NestedDraft(View(model, Granularity.parse("layers=0-1")), few)
        states = [committed(model, list(range(1, length))) for length in (5, 3, 9)]
        samplers = [
            make_sampler(params, SeededRandom(seed), verifier if params.temperature else "token")
            for seed in range(3)
        ]
        steps = [draft.propose(*row) for row in zip(states, (3, 1, 5), samplers, strict=True)]
        if model is packed:
            passes = [next(one) for one in steps]
            assert all(one.draws is not None for one in passes)
            found[model] = [ended(one, rows) for one, rows in zip(steps, run(passes), strict=True)]
        else:
            found[model] = [run_steps(one) for one in steps]
    for ours, theirs in zip(found[packed], found[tiny_model], strict=True):
        assert ours.ids == theirs.ids
        assert bool(ours.probs) == bool(theirs.probs) == (verifier != "greedy")
        if ours.probs:
            torch.testing.assert_close(torch.cat(ours.probs), torch.cat(theirs.probs), rtol=0, atol=1e-5)


def ended(steps: Steps[Proposal], rows_TV: Tensor) -> Proposal:
    with pytest.raises(StopIteration) as end:
        steps.send(rows_TV)
    proposal: Proposal = end.value.value
    return proposal
