"""The knapsack is exact: its frontier is that of every choice there is."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.search.knapsack import knapsack_frontier

Numbers = list[list[float]]


def brute_force(costs: Numbers, losses: Numbers) -> list[tuple[float, float]]:
    every = sorted(
        (
            sum(c[k] for c, k in zip(costs, choice, strict=True)),
            sum(s[k] for s, k in zip(losses, choice, strict=True)),
        )
        for choice in itertools.product(*(range(len(one)) for one in costs))
    )
    kept: list[tuple[float, float]] = []
    for cost, loss in every:
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


@st.composite
def problems(draw: st.DrawFn) -> tuple[Numbers, Numbers]:
    layers, options = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    whole = st.lists(
        st.lists(st.integers(0, 30).map(float), min_size=options, max_size=options),
        min_size=layers,
        max_size=layers,
    )
    return draw(whole), draw(whole)


@given(problems())
def test_the_frontier_is_that_of_every_choice(problem: tuple[Numbers, Numbers]) -> None:
    costs, losses = problem
    points = knapsack_frontier(costs, losses)
    assert [(one.cost, one.loss) for one in points] == brute_force(costs, losses)
    for one in points:
        assert one.cost == sum(c[k] for c, k in zip(costs, one.choice, strict=True))
        assert one.loss == sum(s[k] for s, k in zip(losses, one.choice, strict=True))


def test_a_thousand_random_problems_of_real_losses() -> None:
    random = np.random.default_rng(0)
    for _ in range(1000):
        layers, options = int(random.integers(1, 7)), int(random.integers(1, 4))
        costs = random.integers(1, 9, (layers, options)).astype(float).tolist()
        losses = random.random((layers, options)).tolist()
        found = [(one.cost, one.loss) for one in knapsack_frontier(costs, losses)]
        np.testing.assert_allclose(found, brute_force(costs, losses))


def test_the_whole_frontier_of_thirty_layers_takes_seconds_at_most() -> None:
    random = np.random.default_rng(0)
    widths = [96, 192, 288, 384, 576, 768, 1152, 1536]
    options = [(3 * 576 * width + 2 * 576 * 64 * 4 * groups) for width in widths for groups in (1, 2, 3)]
    losses = -np.sort(-random.random((30, len(options))), axis=1)
    begin = time.process_time()
    points = knapsack_frontier([options] * 30, losses.tolist())
    assert time.process_time() - begin < 10  # of the processor, with room for a slow one
    assert len(points) > 100


def test_rounded_costs_never_exceed_what_they_stand_for() -> None:
    random = np.random.default_rng(1)
    costs, losses = random.random((6, 4)), random.random((6, 4))
    points = knapsack_frontier(costs.tolist(), losses.tolist(), exact=False)
    exact = brute_force(costs.tolist(), losses.tolist())
    assert points[-1].loss == pytest.approx(exact[-1][1])
    for one in points:
        best = min(loss for cost, loss in exact if cost <= one.cost + 1e-9)
        assert one.loss >= best - 1e-12
