"""The time of a decoded token of every member of a model on this machine, from a few timed passes.

The time of a pass is taken as a constant and a part for each layer, which depends on its widths. Uniform
members of two depths give both; members with unequal layers then show how far off that is.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.base.errors import NestlingError
from models.base.stopwatch import Clock, alternate
from models.decode.tune.timing import PLAIN_PASSES, filled_cache, plain_passes
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity, LayerPlan
from models.elastic.model import ElasticLM
from models.elastic.view import View

FORMAT = 1
Widths = tuple[int, int]
"""Neurons and key/value groups of a layer."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Seconds of a decoded token: `ends` for embedding and head, and a part for each layer by its widths.

    Args:
        machine: processor that it was measured on.
        dtype: dtype of the weights.
        shape: hidden size, neurons, groups and vocabulary of the full model.
        ends: seconds without any layer.
        layers: widths of a layer -> its seconds.
        residual: largest error on members that the table was not made of, as a fraction.
    """

    machine: str
    dtype: str
    shape: tuple[int, ...]
    ends: float
    layers: Mapping[Widths, float]
    residual: float

    def seconds(self, config: ElasticConfig, member: Granularity) -> float:
        """Return the seconds of a decoded token of a member."""
        return self.ends + sum(self.layer(layer) for layer in member.resolve(config).layers)

    def layer(self, layer: LayerPlan) -> float:
        """Return the seconds of a layer; between two widths they rise in proportion.

        Raises:
            NestlingError: if the table has no layer with these groups.
        """
        if (layer.ffn, layer.groups) in self.layers:
            return self.layers[layer.ffn, layer.groups]
        known = sorted(
            (ffn, seconds) for (ffn, groups), seconds in self.layers.items() if groups == layer.groups
        )
        if not known:
            raise NestlingError(
                f"the table of latencies has no layer of {layer.groups} groups; measure again"
            )
        if len(known) == 1:
            return known[0][1]
        above = next((place for place, (ffn, _) in enumerate(known) if ffn > layer.ffn), len(known) - 1)
        (low, first), (high, second) = known[max(above, 1) - 1], known[max(above, 1)]
        return first + (second - first) * (layer.ffn - low) / (high - low)

    def to_json(self) -> dict[str, Any]:
        """Return the table as what JSON can hold; `from_json` reads it back."""
        layers = [{"ffn": ffn, "groups": groups, "seconds": s} for (ffn, groups), s in self.layers.items()]
        fields = {"machine": self.machine, "dtype": self.dtype, "shape": list(self.shape), "ends": self.ends}
        return {"format": FORMAT, **fields, "layers": layers, "residual": self.residual}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "LatencyTable":
        """Read what `to_json` gave.

        Raises:
            NestlingError: if it is no whole table.
        """
        try:
            layers = {
                (int(one["ffn"]), int(one["groups"])): float(one["seconds"]) for one in fields["layers"]
            }
            return LatencyTable(
                machine=str(fields["machine"]),
                dtype=str(fields["dtype"]),
                shape=tuple(map(int, fields["shape"])),
                ends=float(fields["ends"]),
                layers=layers,
                residual=float(fields["residual"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise NestlingError(
                f"it is no table of latencies ({error!r}); let this machine measure one"
            ) from None


def shape_of(config: ElasticConfig) -> tuple[int, ...]:
    """Return what a table of latencies is for."""
    return config.hidden_size, config.intermediate_size, config.num_key_value_heads, config.vocab_size


def measure_latency(
    model: ElasticLM,
    options: Sequence[tuple[float, float]],
    checks: Sequence[Granularity],
    *,
    machine: str,
    dtype: str,
    budget: float = 3.0,
    clock: Clock = time.perf_counter,
) -> LatencyTable:
    """Time uniform members of this model, packed as it decodes, and make the table.

    Args:
        model: the model, packed.
        options: fractions of neurons and of groups, the full ones among them.
        checks: members that the table is compared with, not made of.
        machine: the processor's name.
        dtype: dtype of the weights.
        budget: seconds.
        clock: returns the time in seconds; on a busy machine that of the thread, which then must be one.
    """
    config = model.config
    half = tuple(range(max(1, config.num_hidden_layers // 2)))
    members = [Granularity(ffn=(ffn,), heads=(heads,)) for ffn, heads in options]
    shallow = Granularity(layers=half)
    cache = filled_cache(model, 1)
    timed = list(dict.fromkeys([*members, shallow, *checks]))
    cells = {one: plain_passes(View(model, one), cache) for one in timed}
    with torch.inference_mode():
        runs = alternate(cells, budget=budget, clock=clock, before=cells).median
    seconds = {one: run / PLAIN_PASSES for one, run in runs.items()}
    full = seconds[Granularity()]
    depth = config.num_hidden_layers
    per_layer = (full - seconds[shallow]) / max(1, depth - len(half))
    ends = max(0.0, full - depth * per_layer)
    layers = {}
    for member in members:
        layer = member.resolve(config).layers[0]
        layers[layer.ffn, layer.groups] = max(0.0, (seconds[member] - ends) / depth)
    table = LatencyTable(
        machine=machine, dtype=dtype, shape=shape_of(config), ends=ends, layers=layers, residual=0.0
    )
    errors = [abs(table.seconds(config, one) / seconds[one] - 1) for one in checks]
    return dataclasses.replace(table, residual=max(errors, default=0.0))
