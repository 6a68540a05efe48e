import functools
import math
import typing
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train.objective.divergences import DIVERGENCES, alpha, greedy_match
from train.recipe.sections import DivergenceName, LossConfig

NAMES = sorted(DIVERGENCES)
INF = math.inf
FP32_ATOL = 2e-6
"""A sum over at most 6 tokens of terms up to about 1, each rounded to fp32 a few times."""


@st.composite
def pairs(draw: st.DrawFn, lowest: float = -INF, spread: float = 40.0) -> tuple[Tensor, Tensor]:
    """Logits of p and q [N, V]; by default any logit of either side may be -inf, but not a whole row."""
    num_rows, width = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    finite = st.floats(-spread, spread, width=32)
    logit = finite | st.just(lowest) if lowest == -INF else finite
    row = st.lists(logit, min_size=width, max_size=width).filter(lambda row: max(row) > -INF)
    side = st.lists(row, min_size=num_rows, max_size=num_rows)
    return torch.tensor(draw(side)), torch.tensor(draw(side))


TEMPERATURES = st.floats(0.1, 10.0)
finite_pairs = pairs(lowest=0.0, spread=8.0)


def test_a_recipe_may_choose_every_divergence() -> None:
    assert {"cross_entropy", *DIVERGENCES} == set(typing.get_args(DivergenceName))


# ---------------------------------------------------------------- invariants of every divergence


@pytest.mark.parametrize("name", NAMES)
@given(pair=pairs(), temperature=TEMPERATURES)
def test_a_divergence_is_exactly_zero_where_both_distributions_are_the_same(
    name: str, pair: tuple[Tensor, Tensor], temperature: float
) -> None:
    logits = pair[0]
    assert torch.equal(DIVERGENCES[name](logits, logits.clone(), temperature), torch.zeros(len(logits)))


@pytest.mark.parametrize("name", NAMES)
@given(pair=pairs(), temperature=TEMPERATURES)
def test_a_divergence_is_never_negative_and_always_finite(
    name: str, pair: tuple[Tensor, Tensor], temperature: float
) -> None:
    value = DIVERGENCES[name](*pair, temperature)
    assert value.shape == pair[0].shape[:1]
    assert value.dtype == torch.float32
    assert (value >= 0).all()
    assert value.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@given(pair=pairs(), temperature=TEMPERATURES)
def test_gradients_are_finite_on_both_sides(
    name: str, pair: tuple[Tensor, Tensor], temperature: float
) -> None:
    p, q = (logits.requires_grad_() for logits in pair)
    DIVERGENCES[name](p, q, temperature).sum().backward()
    for logits in (p, q):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (logits.grad[logits == -INF] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rest", [-INF, -80.0, -48.0], ids=["nothing", "1e-35", "1e-21"])
def test_distributions_with_hardly_a_common_token_are_finite_and_so_are_gradients(
    name: str, rest: float
) -> None:
    p = torch.tensor([[0.0, 1.0, rest, rest]], requires_grad=True)
    q = torch.tensor([[rest, rest, 2.0, 0.0]], requires_grad=True)
    value = DIVERGENCES[name](p, q)
    value.sum().backward()
    assert 0.5 < value.item() < 88
    assert p.grad is not None
    assert q.grad is not None
    assert p.grad.isfinite().all()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_enormous_logits_are_finite_too(name: str, scale: float) -> None:
    p = scale * torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    q = (scale * torch.tensor([[-1.0, 1.0, 0.0], [1.0, 0.0, -1.0]])).requires_grad_()
    value = DIVERGENCES[name](p, q, 0.5)
    value.sum().backward()
    assert value.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()


# ---------------------------------------------------------------- the definitions, in plain Python

Probs = list[float]


def probs(logits: Tensor, temperature: float) -> Probs:
    weights = [math.exp(logit / temperature) for logit in logits.double().tolist()]
    return [weight / sum(weights) for weight in weights]


def kl(p: Probs, q: Probs) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p: Probs, q: Probs, share: float) -> Probs:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def shared(p: Probs, q: Probs) -> float:
    return sum(map(min, p, q))


def hybrid(p: Probs, q: Probs, eta: float) -> float:
    share = math.exp(-eta * shared(p, q))
    return share * kl(p, q) + (1 - share) * (1 - shared(p, q))


PLAIN: dict[str, Callable[[Probs, Probs], float]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: 0.5 * (kl(p, mix(p, q, 0.5)) + kl(q, mix(p, q, 0.5))),
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
    "skew_kl": lambda p, q: kl(p, mix(p, q, 0.1)),
    "neg_log_alpha": lambda p, q: -math.log(shared(p, q)),
    "kl_tv": lambda p, q: hybrid(p, q, 3.0),
}


@pytest.mark.parametrize("name", NAMES)
@given(pair=finite_pairs, temperature=st.floats(0.5, 4.0))
def test_a_divergence_is_its_definition(name: str, pair: tuple[Tensor, Tensor], temperature: float) -> None:
    ours = DIVERGENCES[name](*pair, temperature)
    theirs = [PLAIN[name](probs(p, temperature), probs(q, temperature)) for p, q in zip(*pair, strict=True)]
    torch.testing.assert_close(ours, torch.tensor(theirs), atol=FP32_ATOL, rtol=1e-4)


@given(pair=finite_pairs, beta=st.floats(0.05, 0.95), skew=st.floats(0.001, 0.95), eta=st.floats(0.0, 9.0))
def test_settings_mean_what_the_papers_mean(
    pair: tuple[Tensor, Tensor], beta: float, skew: float, eta: float
) -> None:
    pairs_of_probs = [(probs(p, 1.0), probs(q, 1.0)) for p, q in zip(*pair, strict=True)]
    expected = {
        "jensen_shannon": [
            beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta)) for p, q in pairs_of_probs
        ],
        "skew_kl": [kl(p, mix(p, q, skew)) for p, q in pairs_of_probs],
        "kl_tv": [hybrid(p, q, eta) for p, q in pairs_of_probs],
    }
    settings = {"jensen_shannon": {"beta": beta}, "skew_kl": {"skew": skew}, "kl_tv": {"eta": eta}}
    for name, theirs in expected.items():
        ours = DIVERGENCES[name](*pair, **settings[name])
        torch.testing.assert_close(ours, torch.tensor(theirs), atol=FP32_ATOL, rtol=1e-4)


# ---------------------------------------------------------------- relations


@given(pair=pairs(), temperature=TEMPERATURES)
def test_jensen_shannon_of_one_half_is_symmetric_and_at_most_log_two(
    pair: tuple[Tensor, Tensor], temperature: float
) -> None:
    p, q = pair
    js = DIVERGENCES["jensen_shannon"]
    torch.testing.assert_close(js(p, q, temperature), js(q, p, temperature), atol=1e-7, rtol=1e-5)
    assert (js(p, q, temperature) <= math.log(2) + FP32_ATOL).all()


@given(pair=pairs(), temperature=TEMPERATURES)
def test_total_variation_is_one_minus_alpha(pair: tuple[Tensor, Tensor], temperature: float) -> None:
    variation = DIVERGENCES["total_variation"](*pair, temperature)
    torch.testing.assert_close(variation, 1 - alpha(*pair, temperature), atol=FP32_ATOL, rtol=0)
    assert (alpha(*pair, temperature) <= 1).all()


@given(pair=pairs(lowest=0.0, spread=3.0))
def test_the_limits_of_the_interpolations(pair: tuple[Tensor, Tensor]) -> None:
    p, q = (logits.double() for logits in pair)
    forward, reverse = DIVERGENCES["forward_kl"](p, q), DIVERGENCES["reverse_kl"](p, q)
    js, skew, kl_tv = (DIVERGENCES[name] for name in ("jensen_shannon", "skew_kl", "kl_tv"))
    assert torch.equal(skew(p, q, skew=0.0), forward)
    assert torch.equal(skew(p, q, skew=1.0), torch.zeros_like(forward))
    assert torch.equal(kl_tv(p, q, eta=0.0), forward)
    near = functools.partial(torch.testing.assert_close, atol=1e-3, rtol=1e-2)
    near(skew(p, q, skew=1e-6), forward)
    near(js(p, q, beta=1e-6) / 1e-6, forward)
    near(js(p, q, beta=1 - 1e-6) / 1e-6, reverse)
    near(kl_tv(p, q, eta=1e6), DIVERGENCES["total_variation"](p, q))


@given(pair=pairs(), share=st.floats(0.01, 0.99))
def test_skew_kl_is_at_most_minus_log_skew(pair: tuple[Tensor, Tensor], share: float) -> None:
    value = DIVERGENCES["skew_kl"](*pair, skew=share)
    assert (value <= -math.log(share) + 1e-5).all()


@given(pair=finite_pairs)
def test_kl_bounds_total_variation(pair: tuple[Tensor, Tensor]) -> None:
    """Pinsker's inequality."""
    variation, kl_value = DIVERGENCES["total_variation"](*pair), DIVERGENCES["forward_kl"](*pair)
    assert (variation <= (kl_value / 2).sqrt() + 1e-3).all()


@pytest.mark.parametrize("name", NAMES)
@given(pair=pairs(), temperature=TEMPERATURES)
def test_a_token_does_not_see_its_companions(
    name: str, pair: tuple[Tensor, Tensor], temperature: float
) -> None:
    together = DIVERGENCES[name](*pair, temperature)
    alone = [DIVERGENCES[name](p[None], q[None], temperature) for p, q in zip(*pair, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=FP32_ATOL, rtol=1e-6)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", [name for name in NAMES if name != "kl_tv"])
def test_the_gradient_is_the_derivative(name: str) -> None:
    """In float64, at logits without ties; kl_tv holds a factor constant, so it has its own test."""
    p, q = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(
        lambda p, q: DIVERGENCES[name](p, q, 1.7), (p.requires_grad_(), q.requires_grad_())
    )


def gradient(name: str, p: Tensor, q: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(DIVERGENCES[name](p, q).sum(), q)
    return grad


def test_minus_log_alpha_pulls_like_total_variation_over_alpha() -> None:
    """Equation 9 of LK losses (2602.23881): the gradient does not vanish where alpha is small."""
    p, q = torch.randn(2, 4, 7, dtype=torch.float64).mul(3).unbind()
    q.requires_grad_()
    expected = gradient("total_variation", p, q) / alpha(p, q)[:, None]
    torch.testing.assert_close(gradient("neg_log_alpha", p, q), expected)


def test_the_hybrid_holds_its_share_constant() -> None:
    p, q = torch.randn(2, 4, 7, dtype=torch.float64).unbind()
    q.requires_grad_()
    share = torch.exp(-3.0 * alpha(p, q))[:, None]
    expected = share * gradient("forward_kl", p, q)
    expected = expected + (1 - share) * gradient("total_variation", p, q)
    torch.testing.assert_close(gradient("kl_tv", p, q), expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_computed_in_fp32(name: str) -> None:
    p, q = torch.randn(2, 4, 50).to(torch.bfloat16).unbind()
    q.requires_grad_()
    value = DIVERGENCES[name](p, q)
    assert torch.equal(value, DIVERGENCES[name](p.float(), q.float()))
    value.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- the table, and measures


def test_the_table_holds_what_a_recipe_may_name() -> None:
    choices = typing.get_args(typing.get_type_hints(LossConfig)["divergence"])
    assert {*DIVERGENCES, "cross_entropy"} == set(choices)


@given(pair=pairs())
def test_greedy_match_compares_the_most_likely_tokens(pair: tuple[Tensor, Tensor]) -> None:
    expected = [p.index(max(p)) == q.index(max(q)) for p, q in zip(*(x.tolist() for x in pair), strict=True)]
    assert greedy_match(*pair).tolist() == expected
