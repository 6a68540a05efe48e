import math
from collections import Counter

import pytest
import torch

from models.decode.sampling.rng import Random, SeededRandom
from models.verify.exact import Distribution, Output, chi_square, exact_distribution, total_variation

Counts = dict[Output, int]

DISTRIBUTION: Distribution = {(0,): 0.5, (1,): 0.3, (2,): 0.2}


def test_every_branch_is_walked_and_equal_outputs_add_up() -> None:
    def run(random: Random) -> list[int]:
        if random.accept(0.25):
            return [7]
        first = random.draft(torch.tensor([0.5, 0.0, 0.5]))
        return [first, random.target(torch.tensor([0.0, 1.0, 0.0]))] if first else [7]

    assert exact_distribution(run) == pytest.approx({(7,): 0.25 + 0.375, (2, 1): 0.375})


def test_total_variation_is_that_of_the_definition() -> None:
    assert total_variation(DISTRIBUTION, DISTRIBUTION) == 0
    assert total_variation(DISTRIBUTION, {(0,): 0.4, (1,): 0.3, (9,): 0.3}) == pytest.approx(0.3)


def test_the_p_value_is_pearsons() -> None:
    # Two degrees of freedom: the chance to exceed x is exp(-x / 2).
    counts: Counts = {(0,): 60, (1,): 25, (2,): 15}
    statistic = 10**2 / 50 + 5**2 / 30 + 5**2 / 20
    assert chi_square(counts, DISTRIBUTION) == pytest.approx(math.exp(-statistic / 2))


def test_an_output_that_cannot_be_has_no_excuse() -> None:
    assert chi_square({(0,): 500, (1,): 300, (2,): 199, (3,): 1}, DISTRIBUTION) == 0.0


def test_rare_outputs_are_judged_together() -> None:
    distribution: Distribution = {(0,): 0.9, **{(token,): 0.001 for token in range(1, 101)}}
    rare: Counts = {(0,): 900, **{(token,): 1 for token in range(1, 101)}}
    assert chi_square(rare, distribution) == pytest.approx(1.0)
    assert chi_square({(0,): 999, (1,): 1}, distribution) < 1e-6


def test_true_counts_give_small_p_values_as_seldom_as_they_say() -> None:
    def p_value(seed: int) -> float:
        random, probs_V = SeededRandom(seed), torch.tensor([0.5, 0.3, 0.2])
        counts: Counter[Output] = Counter((random.target(probs_V),) for _ in range(200))
        return chi_square(counts, DISTRIBUTION)

    p_values = [p_value(seed) for seed in range(100)]
    # The seeds are fixed; over their choice each bound fails with probability under 1e-6.
    assert sum(value < 0.1 for value in p_values) < 30
    assert sum(value < 0.5 for value in p_values) > 20
