"""Tokens per round foretold from a text, against the engine and against exact distributions of rounds."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from models.decode.engine.draft import NestedDraft
from models.decode.engine.engine import stream
from models.decode.engine.trimmed_head import TrimmedHead
from models.decode.sampling.params import SamplingParams, sampling_probs
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import VERIFIER_NAMES, Coupled, Proposal
from models.decode.sampling.verifiers import VERIFIERS
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.acceptance import Acceptance, _values, continue_rows, measure_acceptance
from models.measure.consistency import evaluate_shared_alpha
from models.packed.quantize import pack
from models.verify.exact import ScriptedRandom

GREEDY, WARM = SamplingParams(), SamplingParams(temperature=1.0)
EXACT = 1e-9
FP32_SUMS = 2e-5
EXIT, NARROW = Granularity.parse("layers=0-1"), Granularity.parse("ffn=0.5,layers=0-2")


def text_of(model: ElasticLM, params: SamplingParams, num_rows: int = 3, num_tokens: int = 12) -> Tensor:
    prompts_RP = torch.randint(0, model.config.vocab_size, (num_rows, 4))
    return continue_rows(model, prompts_RP, num_tokens, params)


@pytest.mark.parametrize("params", [GREEDY, WARM])
def test_a_row_is_continued_as_plain_decoding_does_it_alone(
    tiny_model: ElasticLM, params: SamplingParams
) -> None:
    tokens_RT = text_of(tiny_model.double(), params)
    assert tokens_RT.shape == (3, 16)
    for row_T in tokens_RT.tolist():
        if params.is_greedy:
            theirs = [
                token.id for token in stream(tiny_model, row_T[:4], max_new_tokens=12, eos_token_ids=())
            ]
            assert row_T[4:] == theirs


def test_rows_are_drawn_from_the_distribution(tiny_model: ElasticLM) -> None:
    tokens_RT = continue_rows(tiny_model, torch.tensor([[1, 2]] * 4000), 1, WARM, seed=3)
    p_V = sampling_probs(tiny_model(torch.tensor([[1, 2]]))[0, -1:], WARM)[0].detach()
    counts_V = torch.bincount(tokens_RT[:, -1], minlength=64)
    # 6 sigma and a count for each of 64 counts: fails by chance less than once in a million.
    sigma_V = (4000 * p_V * (1 - p_V)).sqrt()
    assert ((counts_V - 4000 * p_V).abs() <= 6 * sigma_V + 1).all()


@pytest.mark.parametrize("precision", [None, "int8"])
def test_alpha_is_the_shared_alpha_of_the_same_places(tiny_model: ElasticLM, precision: str | None) -> None:
    tokens_RT = text_of(tiny_model, WARM)
    source = tiny_model if precision is None else pack(tiny_model, precision)
    drafts = {str(g): View(source, g) for g in (EXIT, NARROW)}
    labels_RT = tokens_RT[:, 1:].clone()
    labels_RT[:, :3] = -100
    theirs = evaluate_shared_alpha(tiny_model, drafts, [(tokens_RT[:, :-1], labels_RT)])
    measured = measure_acceptance(tiny_model, drafts, tokens_RT, WARM, num_prompt=4)
    assert {name: one.alpha for name, one in measured.items()} == pytest.approx(theirs, rel=FP32_SUMS)


def test_few_tokens_are_measured_by_their_own_distribution(tiny_model: ElasticLM) -> None:
    tokens_RT, view = text_of(tiny_model, WARM), View(tiny_model, EXIT)
    few, everything = torch.arange(0, 64, 2), torch.arange(64)
    drafts: dict[str, View | TrimmedHead]
    drafts = {"all": view, "few": TrimmedHead(view, few), "everything": TrimmedHead(view, everything)}
    measured = measure_acceptance(tiny_model, drafts, tokens_RT, WARM, num_prompt=4)
    assert measured["everything"].alpha == pytest.approx(measured["all"].alpha, rel=FP32_SUMS)
    odd_RN = tokens_RT[:, 4:].numpy() % 2 == 1
    assert (measured["few"].ratio_RN[odd_RN] == 0).all()
    assert (measured["few"].coupled_RN[odd_RN] == 0).all()
    assert measured["few"].alpha < measured["all"].alpha


def engine_rounds(model: ElasticLM, draft: NestedDraft, row_T: list[int], gamma: int) -> float:
    tokens = stream(
        model, row_T[:4], draft=draft, gamma=gamma, max_new_tokens=len(row_T) - 4, eos_token_ids=()
    )
    assert [token.id for token in tokens] == row_T[4:]
    return tokens.report.rounds


@pytest.mark.parametrize("gamma", [1, 3])
def test_greedy_rounds_are_the_engines(tiny_model: ElasticLM, gamma: int) -> None:
    """The rounds that end inside the text are counted: the last one may be cut."""
    model = tiny_model.double()
    tokens_RT = text_of(model, GREEDY, num_rows=4, num_tokens=60)
    for precision in (None, "int8"):
        view = View(model if precision is None else pack(model, precision), EXIT)
        measured = measure_acceptance(model, {"D": view}, tokens_RT, GREEDY, num_prompt=4, block=1000)
        tau = measured["D"].tokens_per_round("block", [gamma])[gamma]
        rounds = [engine_rounds(model, NestedDraft(view), row_T, gamma) for row_T in tokens_RT.tolist()]
        # 59 tokens after the prefill's; at most one round of each row is cut.
        assert sum(rounds) == pytest.approx(4 * 59 / tau, abs=4)


def test_a_round_is_followed_through_the_text() -> None:
    ratio_RN = np.array([[0.5, 2.0, 0.25, 1.0]])
    one = Acceptance(overlap_RN=ratio_RN, ratio_RN=ratio_RN, coupled_RN=ratio_RN / 2)
    # Starts at 0, then at 1 or 2, where a round of one token still has a bonus.
    by_hand = {
        "token": (1 + 0.5 + 0.5 * (1 + 1) + (0.5 + 0) * (1 + 0.25)) / (1 + 0.5 + 0.5),
        "coupled": (1.25 + 0.75 * 2 + 0.25 * 1.125) / 2,
    }
    assert one.tokens_per_round("token", [1])[1] == pytest.approx(by_hand["token"])
    assert one.tokens_per_round("coupled", [1])[1] == pytest.approx(by_hand["coupled"])
    # A round of two, from 0 or 1: block keeps the second token where token by token would not.
    token, block = (one.tokens_per_round(name, [2])[2] for name in ("token", "block"))
    assert token == pytest.approx((1 + 0.5 + 0.5 + 0.5 * (1 + 1 + 0.25)) / 1.5)
    assert block == pytest.approx((1 + 0.5 + 0.5 + 0.5 * (1 + 1 + 0.5)) / 1.5)


GAMMA = 2


def round_probs() -> tuple[Tensor, Tensor]:
    """p and q of a model without memory: three places, a vocabulary of three."""
    p_TV = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    q_TV = torch.tensor([[0.3, 0.1, 0.6], [0.5, 0.5, 0.0]], dtype=torch.float64)
    return p_TV, q_TV


def exact_tokens(verifier: str) -> float:
    """Expected tokens of one round of the shipped verifier, over all its choices."""
    p_TV, q_TV = round_probs()
    total = 0.0
    script: list[int] | None = []
    while script is not None:
        random = ScriptedRandom(script)
        drafted = [random.draft(q_V) for q_V in q_TV]
        total += len(VERIFIERS[verifier](p_TV, q_TV, drafted, random)) * random.weight
        script = random.next_script()
    return total


@pytest.mark.parametrize("verifier", VERIFIER_NAMES)
def test_the_chances_given_the_text_add_up_to_the_verifiers_own(verifier: str) -> None:
    """Summed over all texts by their probability under p."""
    p_TV, q_TV = round_probs()
    foretold = 0.0
    for text in itertools.product(range(3), repeat=GAMMA):
        rows = [measured_values(p_TV[t], q_TV[t], token) for t, token in enumerate(text)]
        overlap, ratio, coupled = (np.array([[*column, 0.0]]) for column in zip(*rows, strict=True))
        one = Acceptance(overlap_RN=overlap, ratio_RN=ratio, coupled_RN=coupled)
        weight = float(p_TV[0, text[0]] * p_TV[1, text[1]])
        foretold += weight * one.tokens_per_round(verifier, [GAMMA])[GAMMA]
    if verifier == "coupled":
        assert foretold == pytest.approx(coupled_tokens(3000), abs=0.075)  # 5 sigma
    else:
        assert foretold == pytest.approx(exact_tokens(verifier), abs=EXACT)


def measured_values(p_V: Tensor, q_V: Tensor, token: int) -> list[float]:
    values_3N = _values(p_V[None], q_V[None], torch.tensor([[token]]), is_greedy=False)
    return [float(value) for value in values_3N[:, 0]]


def coupled_tokens(num_trials: int) -> float:
    p_TV, q_TV = round_probs()
    total = 0
    for seed in range(num_trials):
        sampler, proposal = Coupled(WARM, SeededRandom(seed)), Proposal([0])
        for q_V in q_TV:
            sampler.draft(q_V.log(), proposal)
        total += len(sampler.verify(p_TV.log(), proposal).kept)
    return total / num_trials


def test_sampled_rounds_are_the_engines(tiny_model: ElasticLM) -> None:
    tokens_RT = text_of(tiny_model, WARM, num_rows=25, num_tokens=40)
    view = View(tiny_model, Granularity.parse("ffn=0.5"))
    measured = measure_acceptance(tiny_model, {"L": view}, tokens_RT, WARM, num_prompt=4)
    foretold = measured["L"].tokens_per_round("block", [3])[3]
    rounds = num_tokens = 0
    for seed, row_T in enumerate(tokens_RT.tolist()):
        tokens = stream(
            tiny_model, row_T[:4], draft=NestedDraft(view), gamma=3, params=WARM,
            max_new_tokens=40, eos_token_ids=(), random=SeededRandom(seed),
        )  # fmt: skip
        num_tokens += len(list(tokens)) - 1
        rounds += tokens.report.rounds
    # Seeds are fixed, so this cannot fail by chance; some 400 rounds a side, one in 15 cut by the end.
    assert num_tokens / rounds == pytest.approx(foretold, rel=0.1)
