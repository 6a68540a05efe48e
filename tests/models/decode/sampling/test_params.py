import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.base.errors import UsageError
from models.decode.sampling import params as sampling
from models.decode.sampling.params import SamplingParams, penalise, sampling_probs

ROUNDING = 1e-9  # float64 sums of a few dozen probabilities
FP32_ROUNDING = 1e-5  # float32 sums of a few hundred

LOGITS = st.lists(st.integers(-40, 40), min_size=1, max_size=40).map(
    lambda tenths: torch.tensor(tenths, dtype=torch.float64) / 10  # often equal
)


def likeliest_first(probs_V: Tensor) -> list[int]:
    return sorted(range(len(probs_V)), key=lambda token: (-float(probs_V[token]), token))


@given(LOGITS, st.floats(0.3, 3), st.integers(1, 50))
def test_top_k_keeps_the_k_likeliest_and_the_lower_id_among_equals(
    logits_V: Tensor, temperature: float, k: int
) -> None:
    all_V = sampling_probs(logits_V, SamplingParams(temperature=temperature))
    ours_V = sampling_probs(logits_V, SamplingParams(temperature=temperature, top_k=k))
    kept = likeliest_first(all_V)[:k]
    theirs_V = torch.zeros_like(all_V)
    theirs_V[kept] = all_V[kept] / all_V[kept].sum()
    torch.testing.assert_close(ours_V, theirs_V, rtol=0, atol=ROUNDING)


@given(LOGITS, st.floats(0.3, 3), st.integers(0, 50), st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_that_reaches_p(
    logits_V: Tensor, temperature: float, k: int, p: float
) -> None:
    before_V = sampling_probs(logits_V, SamplingParams(temperature=temperature, top_k=k))
    ours_V = sampling_probs(logits_V, SamplingParams(temperature=temperature, top_k=k, top_p=p))
    num_kept = int((ours_V > 0).sum())
    kept = likeliest_first(before_V)[:num_kept]
    assert sorted(kept) == ours_V.nonzero().flatten().tolist()
    assert before_V[kept].sum() >= p - ROUNDING
    assert num_kept == 1 or before_V[kept[:-1]].sum() < p + ROUNDING
    theirs_V = before_V[kept] / before_V[kept].sum()
    torch.testing.assert_close(ours_V[kept], theirs_V, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_a_nucleus_beyond_the_first_guess_is_found_by_sorting(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_TV = torch.randn(3, 200)
    params = SamplingParams(temperature=temperature, top_p=0.9)
    sorted_TV = sampling_probs(logits_TV, params)
    monkeypatch.setattr(sampling, "NUCLEUS_GUESS", 4)
    torch.testing.assert_close(sampling_probs(logits_TV, params), sorted_TV, rtol=0, atol=0)
    assert int((sorted_TV > 0).sum(-1).min()) > 4


def test_temperature_zero_is_certain_of_the_likeliest_token_with_the_lowest_id() -> None:
    ours_TV = sampling_probs(
        torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), SamplingParams(top_k=2, top_p=0.1)
    )
    assert ours_TV.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_rows_are_independent_of_each_other() -> None:
    logits_TV = torch.randn(5, 300)
    params = SamplingParams(temperature=0.9, top_k=50, top_p=0.8)
    together_TV = sampling_probs(logits_TV, params)
    for logits_V, ours_V in zip(logits_TV, together_TV, strict=True):
        torch.testing.assert_close(sampling_probs(logits_V, params), ours_V, rtol=0, atol=0)


@given(LOGITS, st.floats(0.3, 3), st.floats(0.01, 1))
def test_min_p_keeps_the_tokens_within_this_factor_of_the_likeliest(
    logits_V: Tensor, temperature: float, p: float
) -> None:
    all_V = sampling_probs(logits_V, SamplingParams(temperature=temperature))
    ours_V = sampling_probs(logits_V, SamplingParams(temperature=temperature, min_p=p))
    theirs_V = torch.where(all_V >= p * all_V.max(), all_V, 0.0)
    torch.testing.assert_close(ours_V, theirs_V / theirs_V.sum(), rtol=0, atol=ROUNDING)


def test_the_penalty_of_each_row_sees_the_prefix_and_the_drafted_tokens_before_it() -> None:
    params, logits_TV = SamplingParams(repetition_penalty=1.5), torch.randn(4, 9)
    together_TV = penalise(logits_TV, params, [3, 1, 3], [5, 2, 5])
    for t in range(4):
        alone_V = penalise(logits_TV[t : t + 1], params, [3, 1, 3, *[5, 2, 5][:t]])[0]
        torch.testing.assert_close(together_TV[t], alone_V, rtol=0, atol=0)
        assert (alone_V != logits_TV[t]).nonzero().flatten().tolist() == sorted({1, 3, *[5, 2][:t]})


# name of ours -> theirs; each is applied to the same logits, after the same context
PROCESSORS: dict[str, tuple[SamplingParams, list[Any]]] = {
    "temperature": (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
    "top-k": (SamplingParams(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
    "top-p": (SamplingParams(temperature=1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
    "min-p": (SamplingParams(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
    "penalty": (
        SamplingParams(temperature=1.0, repetition_penalty=1.8),
        [RepetitionPenaltyLogitsProcessor(1.8)],
    ),
    "all, in their order": (
        SamplingParams(temperature=1.6, top_k=12, top_p=0.9, min_p=0.15, repetition_penalty=0.7),
        [
            RepetitionPenaltyLogitsProcessor(0.7),
            TemperatureLogitsWarper(1.6),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.15),
        ],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_processor_is_that_of_transformers(name: str) -> None:
    params, processors = PROCESSORS[name]
    context, logits_TV = [4, 17, 4, 30], 3 * torch.randn(50, 40)
    theirs_TV = logits_TV.clone()
    for processor in processors:
        theirs_TV = processor(torch.tensor([context] * 50), theirs_TV)
    ours_TV = sampling_probs(penalise(logits_TV, params, context), params)
    torch.testing.assert_close(ours_TV, theirs_TV.softmax(-1), rtol=0, atol=FP32_ROUNDING)
    raw_TV = logits_TV.softmax(-1)
    assert (ours_TV - raw_TV).abs().max() > 0.01


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_distributions_are_in_float32_or_better_and_sum_to_one(given: torch.dtype, used: torch.dtype) -> None:
    probs_TV = sampling_probs(torch.randn(4, 500).to(given), SamplingParams(temperature=0.7, top_p=0.95))
    assert probs_TV.dtype == used
    torch.testing.assert_close(probs_TV.sum(-1), torch.ones(4, dtype=used), rtol=0, atol=FP32_ROUNDING)


def test_a_tiny_temperature_is_greedy_rather_than_infinite() -> None:
    ours_V = sampling_probs(torch.tensor([80.0, 79.0, -80.0]), SamplingParams(temperature=1e-38))
    assert ours_V.tolist() == [1, 0, 0]


def test_a_token_that_the_logits_forbid_is_never_kept() -> None:
    ours_V = sampling_probs(
        torch.tensor([0.0, -math.inf, 0.0]), SamplingParams(temperature=1.0, top_k=3, top_p=0.99)
    )
    assert ours_V.tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "--temperature must be 0 (greedy), or 1e-38 or more, got -1.0"),
        ({"temperature": math.nan}, "--temperature must be 0 (greedy), or 1e-38 or more, got nan"),
        ({"temperature": math.inf}, "--temperature"),
        ({"top_k": -1}, "--top-k must be 0 (off) or more, got -1"),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1 (off), got 0.0"),
        ({"min_p": 1.5}, "--min-p must be from 0 (off) to 1, got 1.5"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be above 0; 1 is off, got 0.0"),
        ({"top_p": 1.1, "top_k": -2}, "--top-k must be 0 (off) or more, got -2; --top-p"),
    ],
)
def test_parameters_without_meaning_are_refused_all_at_once(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-320, 1e-40])
def test_a_temperature_that_fp32_cannot_divide_by_is_refused(temperature: float) -> None:
    with pytest.raises(
        UsageError, match=f"--temperature must be 0 .greedy., or 1e-38 or more, got {temperature}"
    ):
        SamplingParams(temperature=temperature)
