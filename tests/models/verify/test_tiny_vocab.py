"""A model over a few tokens, and passes that are made once: both change nothing that is measured."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from models.decode.sampling.params import SamplingParams
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.packed.quantize import pack
from models.verify.drafts import ForModel, adversarial, member
from models.verify.exact import Distribution, total_variation
from models.verify.restrict import likeliest_tokens, restrict
from models.verify.tiny_vocab import TinyVocab

WARM = SamplingParams(temperature=1.0)
DRAFTS: Mapping[str, ForModel] = {
    "first layers": member(Granularity.parse("layers=0-1")),
    "narrow": member(Granularity.parse("ffn=0.5,heads=0.5,layers=1:3")),
    "narrow in int8": member(Granularity.parse("ffn=0.5,heads=0.5"), "int8"),
    "adversarial": adversarial,
}


def options(draft: str | None, verifier: str) -> dict[str, Any]:
    return {"draft": draft, "verifier": verifier, "gamma": 2, "params": WARM, "length": 4}


@pytest.mark.parametrize("tied", [True, False])
def test_the_distributions_of_the_restricted_model_are_the_models_given_its_tokens(
    tied: bool, make_model: Callable[..., ElasticLM]
) -> None:
    model = make_model(vocab_size=32, tie_word_embeddings=tied, eos_token_id=9)
    small, kept = restrict(model, [17, 4, 9]), [17, 4, 9]
    logits_TV = model(torch.tensor([[4, 17, 17, 9]]))[0, :, kept]
    torch.testing.assert_close(small(torch.tensor([[1, 0, 0, 2]]))[0], logits_TV)
    assert small.config.eos_token_id is None


def test_a_packed_model_is_restricted_from_the_weights_that_it_was_packed_from(
    tiny_model: ElasticLM,
) -> None:
    tokens_BT = torch.tensor([[0, 2, 1]])
    ours = restrict(pack(tiny_model, "int8"), [3, 5, 7], torch.float64)(tokens_BT)
    torch.testing.assert_close(ours, restrict(tiny_model, [3, 5, 7], torch.float64)(tokens_BT))


def test_the_likeliest_tokens_are_those_of_the_mean_distribution(tiny_model: ElasticLM) -> None:
    prompts = [[1, 2, 3], [4]]
    probs = [tiny_model(torch.tensor([ids]))[0, -1].softmax(-1) for ids in prompts]
    ours = likeliest_tokens(tiny_model, prompts, 5)
    assert ours == (probs[0] + probs[1]).argsort(descending=True)[:5].tolist()


@pytest.mark.parametrize("draft", [None, *DRAFTS])
def test_remembered_passes_give_the_distribution_of_passes_made_anew(
    draft: str | None, tiny_model: ElasticLM
) -> None:
    target = restrict(tiny_model, [5, 6], torch.float64)
    ours, theirs = (
        TinyVocab(target, DRAFTS, remember=remember).distribution(**options(draft, "token"))
        for remember in (True, False)
    )
    assert ours == theirs


def test_a_pass_is_made_once(tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    states = ElasticLM.states

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return states(*args, **options)

    monkeypatch.setattr(ElasticLM, "states", counted)
    few = TinyVocab(restrict(tiny_model, [5, 6], torch.float64), DRAFTS)
    few.distribution(**options("narrow", "token"))
    once = len(calls)
    assert 0 < once < 100
    few.distribution(**options("narrow", "token"))
    assert len(calls) == once


def test_the_reference_is_the_distribution_of_full_passes(tiny_model: ElasticLM) -> None:
    target = restrict(tiny_model, [5, 6, 7], torch.float64)
    few = TinyVocab(target, {})
    logits_V = target(torch.tensor([list(TinyVocab.PROMPT)]))[0, -1]
    theirs: Distribution = {(token,): p for token, p in enumerate(logits_V.softmax(-1).tolist())}
    assert total_variation(few.reference(WARM, 1), theirs) < 1e-15
    ended = few.reference(WARM, 3, eos_token_ids={2})
    assert {len(ids) for ids in ended} == {1, 2, 3}
    assert all(2 not in ids[:-1] for ids in ended)
