"""What a member is predicted to lose, from members of which only one layer has another width.

    s_i(k)      loss that layer i at option k costs: the mean of narrowing it alone in the full model, and of
                what it gains when it alone is widened in the narrowest member
    anchors     the uniform member of each option is measured, and sum_i s_i(k) is scaled to what it loses
    layers      do not add up, so that each set of layers has a measured loss of its own, at full width and
                narrowest, between which its s_i are scaled

    steps       a sum does not know that neighbours of very different widths lose more together; once members
                were measured, a second fit has a term for each step between neighbours

The sum is what a knapsack needs, and good enough to find candidates: the second fit predicts what they lose,
and they are then measured.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.decode.tune.timing import rising
from models.elastic.granularity import FULL, Granularity
from models.measure.token_losses import Report, TokenLosses
from train.search.space import Choice, Layers, Option, Space

FEW_LAYERS = 12
"""Up to this many, each layer's removal is tried at every step."""
CANDIDATES = 6
"""Removals that are tried at a step otherwise."""
DOUBT = 0.3
"""Standard deviation of what a sensitivity is off by, as a fraction of it."""
STEP_DOUBT = 1 / 6
"""Likewise of a step over the whole range of widths, as a fraction of what the narrowest member loses."""


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """Predicted losses.

    Args:
        full: loss of the full model.
        sensitivities: layer -> option -> loss above the full model's.
        offsets: set of layers -> what it loses at full width.
        factors: set of layers -> the factor of its layers' sensitivities.
        joint: sensitivities that go with `steps`; empty before members were measured.
        steps: layer -> what the widest step to the layer that runs next loses.
    """

    full: float
    sensitivities: Sequence[Mapping[Option, float]]
    offsets: Mapping[Layers, float]
    factors: Mapping[Layers, float]
    joint: Sequence[Mapping[Option, float]] = ()
    steps: Sequence[float] = ()

    def predict(self, choice: Choice) -> float:
        """Return the predicted loss of a member."""
        steps = sum(size * self.steps[layer] for layer, size in self._steps(choice)) if self.steps else 0.0
        return self._sum(choice, self.joint or self.sensitivities) + steps

    def _sum(self, choice: Choice, sensitivities: Sequence[Mapping[Option, float]]) -> float:
        pairs = zip(choice.layers, choice.options, strict=True)
        total = sum(sensitivities[layer][option] for layer, option in pairs)
        return self.full + self.offsets[choice.layers] + self.factors[choice.layers] * total

    def _steps(self, choice: Choice) -> list[tuple[int, float]]:
        """Return layers, and by how much of the whole range the width changes behind them."""
        least = min(option.ffn for option in self.sensitivities[0])
        if least == 1.0:
            return []
        neighbours = zip(choice.layers, choice.options, choice.options[1:], strict=False)
        return [
            (layer, abs(math.log(one.ffn / other.ffn) / math.log(least))) for layer, one, other in neighbours
        ]

    def corrected(self, measured: Mapping[Choice, float]) -> "Proxy":
        """Return the proxy whose fits explain measured losses best, without going far (ridge)."""
        keys = [(layer, option) for layer, options in enumerate(self.sensitivities) for option in options]
        place = {key: number for number, key in enumerate(keys)}
        num_steps = len(self.sensitivities) - 1
        features = np.zeros((len(measured), len(keys) + num_steps))
        for row, choice in enumerate(measured):
            for layer, option in zip(choice.layers, choice.options, strict=True):
                features[row, place[layer, option]] = self.factors[choice.layers]
            for layer, size in self._steps(choice):
                features[row, len(keys) + layer] = size
        doubts = [self._doubt(layer, option) for layer, option in keys]
        worst = max(sum(one[option] for one in self.sensitivities) for option in self.sensitivities[0])
        every = np.array([*doubts, *[STEP_DOUBT * worst] * num_steps])
        residuals = np.array([loss - self._sum(one, self.sensitivities) for one, loss in measured.items()])
        alone = _ridge(features[:, : len(keys)], residuals, every[: len(keys)])
        together = _ridge(features, residuals, every)
        return dataclasses.replace(
            self,
            sensitivities=self._changed(place, alone),
            joint=self._changed(place, together),
            steps=together[len(keys) :].tolist(),
        )

    def _changed(
        self, place: Mapping[tuple[int, Option], int], changes: NDArray[np.float64]
    ) -> list[dict[Option, float]]:
        return [
            {option: value + float(changes[place[layer, option]]) for option, value in options.items()}
            for layer, options in enumerate(self.sensitivities)
        ]

    def _doubt(self, layer: int, option: Option) -> float:
        """Return how far a sensitivity may be off: in proportion to itself, and to the layers' mean."""
        mean = sum(one[option] for one in self.sensitivities) / len(self.sensitivities)
        return DOUBT * (self.sensitivities[layer][option] + mean)


def _ridge(
    features: NDArray[np.float64], residuals: NDArray[np.float64], doubts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the changes, each about as large as its doubt, that explain residuals."""
    scaled = features * doubts
    ridge = np.eye(len(doubts)) * (float(residuals.std()) / 4 + 1e-6) ** 2
    changes: NDArray[np.float64] = doubts * np.linalg.solve(scaled.T @ scaled + ridge, scaled.T @ residuals)
    return changes


def measure_proxy(
    losses: TokenLosses, space: Space, layer_sets: Sequence[Layers], report: Report | None = None
) -> Proxy:
    """Measure what the proxy needs.

    Args:
        losses: measures members on the text.
        space: the options.
        layer_sets: sets of layers besides all of them.
        report: told how far the work is.
    """
    num_layers, full = space.num_layers, losses.mean(FULL)
    raw = _one_layer_losses(losses, space, report)
    sets = [one for one in layer_sets if one != space.all_layers]
    ends = [
        space.uniform(one, option).member(num_layers) for one in sets for option in (space.full, space.least)
    ]
    uniforms = {
        option: space.uniform(space.all_layers, option).member(num_layers) for option in space.options
    }
    losses.measure([*uniforms.values(), *ends], report, "measuring anchors")
    sensitivities: list[dict[Option, float]] = [{} for _ in range(num_layers)]
    for option, member in uniforms.items():
        wanted = max(0.0, losses.mean(member) - full)
        parts = [one[option] for one in raw]
        total = sum(parts)
        for sensitivity, part in zip(sensitivities, parts, strict=True):
            sensitivity[option] = part * wanted / total if total > 0 else wanted / num_layers
    offsets, factors = {space.all_layers: 0.0}, {space.all_layers: 1.0}
    for layers, widest, narrowest in zip(sets, ends[::2], ends[1::2], strict=True):
        offsets[layers] = losses.mean(widest) - full
        total = sum(sensitivities[layer][space.least] for layer in layers)
        factors[layers] = max(0.0, losses.mean(narrowest) - losses.mean(widest)) / total if total > 0 else 1.0
    return Proxy(full=full, sensitivities=sensitivities, offsets=offsets, factors=factors)


def _one_layer_losses(losses: TokenLosses, space: Space, report: Report | None) -> list[dict[Option, float]]:
    """Return layer -> option -> s_i(k), of each axis alone at trained widths, in between by proportion."""
    num = space.num_layers
    axes = [[Option(ffn, 1.0) for ffn in space.trained_ffn], [Option(1.0, heads) for heads in space.heads]]
    least = space.least
    low = [
        [Option(one.ffn, least.heads) for one in axes[0]],
        [Option(least.ffn, one.heads) for one in axes[1]],
    ]
    wanted: list[Granularity] = []
    for high_axis, low_axis in zip(axes, low, strict=True):
        if len(high_axis) > 1:
            for layer in range(num):
                wanted += [space.except_for(layer, one, space.full).member(num) for one in high_axis]
                wanted += [space.except_for(layer, one, space.least).member(num) for one in low_axis]
    losses.measure(wanted, report, "measuring layers")
    found: list[dict[Option, float]] = []
    for layer in range(num):
        by_axis = []
        for high_axis, low_axis in zip(axes, low, strict=True):
            tops = [losses.mean(space.except_for(layer, one, space.full).member(num)) for one in high_axis]
            bottoms = [losses.mean(space.except_for(layer, one, space.least).member(num)) for one in low_axis]
            sides = [_falling([value - side[-1] for value in side]) for side in (tops, bottoms)]
            by_axis.append([(top + bottom) / 2 for top, bottom in zip(*sides, strict=True)])
        ffn = dict(zip(space.ffn, np.interp(space.ffn, space.trained_ffn, by_axis[0]), strict=True))
        heads = dict(zip(space.heads, by_axis[1], strict=True))
        found.append({option: float(ffn[option.ffn] + heads[option.heads]) for option in space.options})
    return found


def _falling(values: Sequence[float]) -> list[float]:
    """Return the nearest numbers that fall to 0: a wider layer never loses more, and the full one nothing."""
    return [max(0.0, value) for value in rising(reversed([*values[:-1], 0.0]))][::-1]


def find_layer_sets(
    losses: TokenLosses, space: Space, trained: Sequence[Layers], report: Report | None = None
) -> list[Layers]:
    """Return trained sets of layers, and what is left when the least missed layer goes, again and again.

    Removals are judged by real losses at full width: what two layers do does not add up
    (ShortGPT, https://arxiv.org/abs/2403.03853).
    """
    num = space.num_layers
    few = num <= FEW_LAYERS
    left, sets, ranking = space.all_layers, list(trained), list(space.all_layers)
    for step in range(num // 2 if few else num // 4):
        tried = ranking if few or step == 0 else ranking[:CANDIDATES]
        rests = {layer: tuple(other for other in left if other != layer) for layer in tried}
        members = {layer: space.uniform(rest, space.full).member(num) for layer, rest in rests.items()}
        losses.measure(members.values(), report, "dropping layers")
        ranked = sorted(rests, key=lambda layer: losses.mean(members[layer]))
        left = rests[ranked[0]]
        ranking = [*ranked[1:], *(layer for layer in ranking if layer not in rests)]
        sets.append(left)
    return list(dict.fromkeys(one for one in sets if one))
