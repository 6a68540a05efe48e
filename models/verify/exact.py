"""Exact output distributions without sampling, and the distance of two of them.

A decoder takes its random choices from a `Random`. Given one that follows a script and knows the
weight of its branch, it is run once for every branch; the weights of equal outputs add up to the exact
distribution of what it returns. Nothing is drawn, so nothing can fail by chance.

Where choices cannot be walked through (the noise of `coupled`), `chi_square` judges counts instead.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from models.decode.sampling.rng import Random

Output: TypeAlias = tuple[int, ...]
Distribution: TypeAlias = Mapping[Output, float]
"""The probability of each output that is possible."""
Run: TypeAlias = Callable[[Random], Sequence[int]]
"""Decodes with these random choices."""

WEIGHTS_SUM_ATOL = 1e-6  # one minus the branches' total: the rounding of the distributions' own dtype
# Rarer outputs are pooled: chi-square is no good approximation for a handful of counts.
MIN_EXPECTED = 8.0


class ScriptedRandom:
    """Makes scripted choices, the first option where the script ends, and knows their joint weight."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.trail: list[tuple[int, int]] = []  # option taken, number of options
        self.weight = 1.0

    def draft(self, probs_V: Tensor) -> int:
        """See `Random`."""
        return self._take(probs_V.tolist())

    def uniforms(self, count: int) -> None:
        """Return None: choices are scripted, see `draft`."""

    def accept(self, probability: float) -> bool:
        """See `Random`."""
        return self._take([probability, 1.0 - probability]) == 0

    def target(self, probs_V: Tensor) -> int:
        """See `Random`."""
        return self._take(probs_V.tolist())

    def noise(self, position: int, num_tokens: int) -> Tensor:
        """Refuse: real numbers have no list of options."""
        raise NotImplementedError("the noise of coupled decoding cannot be enumerated")

    def _take(self, weights: list[float]) -> int:
        assert min(weights) >= 0, weights
        options = [option for option, weight in enumerate(weights) if weight > 0]
        step = len(self.trail)
        taken = self.script[step] if step < len(self.script) else 0
        self.trail.append((taken, len(options)))
        self.weight *= weights[options[taken]]
        return options[taken]

    def next_script(self) -> list[int] | None:
        """Return the script of the next branch, depth first; None after the last one."""
        trail = list(self.trail)
        while trail and trail[-1][0] + 1 == trail[-1][1]:
            trail.pop()
        return [*(taken for taken, _ in trail[:-1]), trail[-1][0] + 1] if trail else None


def exact_distribution(run: Run) -> Distribution:
    """Return the distribution of what `run` returns, by walking through every branch of its choices.

    >>> exact_distribution(
    ...     lambda random: [random.target(torch.tensor([0.25, 0.75])), int(random.accept(1.0))]
    ... )
    {(0, 1): 0.25, (1, 1): 0.75}
    """
    distribution: dict[Output, float] = defaultdict(float)
    script: list[int] | None = []
    while script is not None:
        random = ScriptedRandom(script)
        distribution[tuple(run(random))] += random.weight
        script = random.next_script()
    assert math.isclose(sum(distribution.values()), 1.0, abs_tol=WEIGHTS_SUM_ATOL), sum(distribution.values())
    return dict(distribution)


def total_variation(ours: Distribution, theirs: Distribution) -> float:
    """Return the largest difference of two distributions for any set of outputs.

    >>> total_variation({(0,): 0.5, (1,): 0.5}, {(0,): 0.75, (2,): 0.25})
    0.5
    """
    keys = ours.keys() | theirs.keys()
    return sum(abs(ours.get(key, 0.0) - theirs.get(key, 0.0)) for key in keys) / 2


def chi_square(counts: Mapping[Output, int], distribution: Distribution) -> float:
    """Return the chance of counts at least as odd as these, if the distribution is true (Pearson's test).

    Outputs that are too rare for the approximation are counted as one; an impossible output that
    came up gives 0.

    >>> chi_square({(0,): 52, (1,): 48}, {(0,): 0.5, (1,): 0.5}) > 0.5
    True
    >>> chi_square({(0,): 90, (1,): 10}, {(0,): 0.5, (1,): 0.5}) < 1e-6
    True
    """
    num_trials = sum(counts.values())
    if any(count and distribution.get(output, 0.0) <= 0.0 for output, count in counts.items()):
        return 0.0
    cells, rest = [], [0.0, 0.0]
    for output, probability in distribution.items():
        cell = (counts.get(output, 0), probability * num_trials)
        if cell[1] >= MIN_EXPECTED:
            cells.append(cell)
        else:
            rest = [rest[0] + cell[0], rest[1] + cell[1]]
    if rest[1] > 0:
        cells.append((int(rest[0]), rest[1]))
    if len(cells) < 2:
        return 1.0
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
