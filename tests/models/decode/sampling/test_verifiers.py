"""Invariant 4 for the verifiers alone: any distributions, also such as no model gives, by enumeration."""

import random as python_random
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from models.decode.sampling.rng import Random
from models.decode.sampling.verifiers import VERIFIERS, residual
from models.verify.exact import exact_distribution

Context = tuple[int, ...]
Distributions = Callable[[Context], Tensor]

EXACT = 1e-12  # float64 sums over a few thousand branches


def uneven(context: Context, salt: str, size: int) -> Tensor:
    source = python_random.Random(f"{salt}{context}")
    return normalised([source.random() ** 3 for _ in range(size)])


def normalised(weights: list[float]) -> Tensor:
    probs_V = torch.tensor(weights, dtype=torch.float64)
    return probs_V / probs_V.sum()


def with_zeros(context: Context, salt: str, size: int) -> Tensor:
    """One token is impossible, another one in each context and for each salt."""
    probs_V = uneven(context, salt, size)
    probs_V[(len(context) + sum(context) + len(salt)) % size] = 0
    return probs_V / probs_V.sum()


def half(salt: int, size: int) -> Tensor:
    return normalised([float(token % 2 == salt) for token in range(size)])


# name -> (p, q) of a context, for a vocabulary of this size
PAIRS: dict[str, Callable[[int], tuple[Distributions, Distributions]]] = {
    "different": lambda size: (lambda c: uneven(c, "p", size), lambda c: uneven(c, "qq", size)),
    "zeros in both": lambda size: (
        lambda c: with_zeros(c, "p", size),
        lambda c: with_zeros(c, "qq", size),
    ),
    "equal": lambda size: (lambda c: uneven(c, "p", size), lambda c: uneven(c, "p", size)),
    "equal at first": lambda size: (
        lambda c: uneven(c, "p", size),
        lambda c: uneven(c, "qq" if len(c) > 1 else "p", size),
    ),
    "disjoint": lambda size: (lambda _: half(0, size), lambda _: half(1, size)),
    "certain draft": lambda size: (
        lambda c: uneven(c, "p", size),
        lambda c: normalised([float(token == len(c) % size) for token in range(size)]),
    ),
    "certain target": lambda size: (
        lambda c: normalised([float(token == len(c) % size) for token in range(size)]),
        lambda c: uneven(c, "qq", size),
    ),
}


def draft_and_verify(
    verifier: str, p: Distributions, q: Distributions, gamma: int, random: Random
) -> list[int]:
    drafted: list[int] = []
    for _ in range(gamma):
        drafted.append(random.draft(q(tuple(drafted))))
    p_TV = torch.stack([p(tuple(drafted[:t])) for t in range(gamma + 1)])
    q_TV = torch.stack([q(tuple(drafted[:t])) for t in range(gamma)])
    return VERIFIERS[verifier](p_TV, q_TV, drafted, random)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("gamma", "size"), [(1, 4), (2, 3), (3, 3), (4, 2)])
def test_the_joint_distribution_of_gamma_plus_one_tokens_is_the_targets(
    verifier: str,
    pair: str,
    gamma: int,
    size: int,
) -> None:
    p, q = PAIRS[pair](size)
    of_a_round = exact_distribution(lambda random: draft_and_verify(verifier, p, q, gamma, random))
    for tokens in product(range(size), repeat=gamma + 1):
        # The rounds that ended earlier go on by the target's distribution; later tokens are its own then.
        ours = sum(
            weight * joint(p, tokens, start=len(kept))
            for kept, weight in of_a_round.items()
            if kept == tokens[: len(kept)]
        )
        assert ours == pytest.approx(joint(p, tokens), abs=EXACT)


def joint(p: Distributions, tokens: Context, start: int = 0) -> float:
    probability = 1.0
    for t in range(start, len(tokens)):
        probability *= float(p(tokens[:t])[tokens[t]])
    return probability


@pytest.mark.parametrize("pair", PAIRS)
def test_block_verification_never_keeps_fewer_tokens_in_expectation(pair: str) -> None:
    p, q = PAIRS[pair](3)
    expected = {}
    for verifier in VERIFIERS:
        distribution = exact_distribution(partial(draft_and_verify, verifier, p, q, 3))
        expected[verifier] = sum(weight * len(kept) for kept, weight in distribution.items())
    assert expected["block"] >= expected["token"] - EXACT
    if pair == "different":
        assert expected["block"] > expected["token"] + 1e-3


def test_the_first_drafted_token_is_accepted_with_the_overlap_of_the_distributions() -> None:
    p, q = PAIRS["different"](4)
    distribution = exact_distribution(lambda random: draft_and_verify("token", p, q, 1, random))
    accepted = sum(weight for kept, weight in distribution.items() if len(kept) == 2)
    assert accepted == pytest.approx(float(torch.minimum(p(()), q(())).sum()), abs=EXACT)


def test_without_a_proposal_a_verifier_draws_from_the_target() -> None:
    p_TV = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    for verify in VERIFIERS.values():
        distribution = exact_distribution(partial(verify, p_TV, p_TV[:0], []))
        assert distribution == pytest.approx({(0,): 0.2, (1,): 0.5, (2,): 0.3})


def test_a_residual_without_mass_is_the_target_itself() -> None:
    p_V = torch.tensor([0.25, 0.75])
    assert residual(p_V, p_V).tolist() == p_V.tolist()
    assert residual(p_V, torch.ones(2)).tolist() == p_V.tolist()
