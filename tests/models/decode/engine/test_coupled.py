"""Coupled decoding gives plain decoding's output, token for token, which is a draw from the target.

Its noise cannot be walked through branch by branch, so the distribution is judged by counts. Each such test
fails by chance with probability P_VALUE at most, over the choice of its seeds.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.engine import stream
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom, gumbel_noise
from models.decode.sampling.samplers import Coupled, Proposal
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import Model, View
from models.measure.reference import full_pass_probs, plain_decode
from models.verify.exact import chi_square, exact_distribution

MakeModel = Callable[..., ElasticLM]

WARM = SamplingParams(temperature=1.0)
SAMPLINGS = {
    "plain": WARM,
    "truncated": SamplingParams(temperature=0.8, top_k=20, top_p=0.95, min_p=0.05),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.5),
    "greedy": SamplingParams(),
}
P_VALUE = 1e-7


def coupled(model: Model, prompt: list[int], seed: int, **options: Any) -> list[int]:
    random = SeededRandom(seed)
    return [token.id for token in stream(model, prompt, random=random, verifier="coupled", **options)]


def nested(model: ElasticLM, text: str) -> Draft:
    return NestedDraft(View(model, Granularity.parse(text)))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_output_depends_neither_on_the_draft_nor_on_its_length(
    name: str, make_model: MakeModel, tiny_model: ElasticLM
) -> None:
    drafts = [nested(tiny_model, text) for text in ("layers=0-2", "ffn=0.5,heads=0.5", "full")]
    drafts += [ModelDraft(View(tiny_model, Granularity.parse("ffn=0.5")))]
    drafts += [NestedDraft(View(tiny_model, Granularity.parse("layers=0-2")), torch.arange(0, 64, 3))]
    drafts += [ModelDraft(make_model(vocab_size=64, dtype=torch.float32, max_position_embeddings=128))]
    options: dict[str, Any] = {"params": SAMPLINGS[name], "max_new_tokens": 20}
    for seed in range(2):
        plain = coupled(tiny_model, [3, 1, 4], seed, **options)
        for index, draft in enumerate(drafts):
            for gamma in (1, 3 + index):
                assert coupled(tiny_model, [3, 1, 4], seed, draft=draft, gamma=gamma, **options) == plain


def test_a_draft_that_is_the_target_is_always_kept(tiny_model: ElasticLM) -> None:
    model = tiny_model.double()
    tokens = stream(
        model, [1], draft=nested(model, "full"), gamma=5, params=WARM, max_new_tokens=50, verifier="coupled"
    )
    list(tokens)
    assert tokens.report.accepted == tokens.report.drafted > 0


def test_seeds_differ(tiny_model: ElasticLM) -> None:
    runs = {tuple(coupled(tiny_model, [1, 2], seed, params=WARM, max_new_tokens=12)) for seed in range(5)}
    assert len(runs) == 5


@pytest.mark.parametrize("text", [None, "layers=0"])
def test_the_joint_distribution_of_the_output_is_the_targets(text: str | None, make_model: MakeModel) -> None:
    model = make_model(vocab_size=3)
    draft = nested(model, text) if text else None
    options: dict[str, Any] = {"draft": draft, "params": WARM, "gamma": 1, "max_new_tokens": 3}
    counts = Counter(tuple(coupled(model, [1, 0], seed, **options)) for seed in range(600))
    p = full_pass_probs(model, WARM)
    theirs = exact_distribution(lambda random: plain_decode(p, [1, 0], max_new_tokens=3, random=random))
    assert chi_square(counts, theirs) > P_VALUE
    wrong = full_pass_probs(model, SamplingParams(temperature=1.6))
    flatter = exact_distribution(lambda random: plain_decode(wrong, [1, 0], max_new_tokens=3, random=random))
    assert chi_square(counts, flatter) < P_VALUE


def test_a_token_is_kept_as_often_as_the_coupling_says() -> None:
    p_V = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q_V = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    accepted, num_trials = 0, 4000
    for seed in range(num_trials):
        sampler, proposal = Coupled(WARM, SeededRandom(seed)), Proposal([0])
        sampler.draft(q_V.log(), proposal)
        accepted += len(sampler.verify(torch.stack([p_V, p_V]).log(), proposal).kept) - 1
    # P(both take v) = 1 / sum_w max(p_w / p_v, q_w / q_v)
    share = sum(1 / float(torch.maximum(p_V / p, q_V / q).sum()) for p, q in zip(p_V, q_V, strict=True))
    overlap = float(torch.minimum(p_V, q_V).sum())
    assert overlap / (2 - overlap) <= share <= overlap
    sigma = math.sqrt(num_trials * share * (1 - share))
    assert abs(accepted - num_trials * share) <= 5 * sigma  # fails by chance once in 1.7 million


def test_an_impossible_token_is_never_chosen() -> None:
    noise_V = gumbel_noise(0, 1, 3)
    probs_V = torch.full((3,), 1.0, dtype=torch.float64)
    probs_V[int(noise_V.argmax())] = 0.0
    sampler, proposal = Coupled(WARM, SeededRandom(0)), Proposal([0])
    assert sampler.draft(probs_V.log(), proposal) != int(noise_V.argmax())
