"""A proxy that was corrected predicts members that it has not seen, steps between neighbours included."""

import itertools

import numpy as np
import pytest

from train.search.proxy import Proxy
from train.search.space import Choice, Option

WIDTHS = (0.125, 0.25, 0.5, 1.0)
LAYERS = (0, 1, 2)
LOST = {0.125: 0.3, 0.25: 0.15, 0.5: 0.05, 1.0: 0.0}


def make_proxy() -> Proxy:
    """The sums that are true where all layers are equal."""
    sensitivities = [{Option(width, 1.0): LOST[width] * (3 - layer) for width in WIDTHS} for layer in LAYERS]
    return Proxy(full=2.0, sensitivities=sensitivities, offsets={LAYERS: 0.0}, factors={LAYERS: 1.0})


def loss(choice: Choice, per_step: float) -> float:
    widths = [option.ffn for option in choice.options]
    steps = sum(abs(np.log2(one / other)) / 3 for one, other in itertools.pairwise(widths))
    return float(
        2.0 + sum(LOST[width] * (3 - layer) for layer, width in enumerate(widths)) + per_step * steps
    )


@pytest.mark.parametrize("per_step", [0.0, 0.2])
def test_members_that_it_has_not_seen_are_predicted(per_step: float) -> None:
    every = [
        Choice(LAYERS, tuple(Option(width, 1.0) for width in widths))
        for widths in itertools.product(WIDTHS, repeat=3)
    ]
    order = np.random.default_rng(0).permutation(len(every))
    seen, unseen = [every[place] for place in order[:24]], [every[place] for place in order[24:]]
    before = make_proxy()
    after = before.corrected({one: loss(one, per_step) for one in seen})
    errors = [[abs(proxy.predict(one) - loss(one, per_step)) for one in unseen] for proxy in (before, after)]
    assert max(errors[1]) < 0.02
    assert max(errors[0]) > 0.2 or per_step == 0.0
    assert after.steps == pytest.approx([per_step] * 2, abs=0.03)
    assert len(after.sensitivities) == len(LAYERS), "the knapsack's sums are there as well"
