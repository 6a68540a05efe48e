"""The time of a decoded token of every member of a model on this machine, from a few timed ones.

Time is no sum over layers: what a small member reads stays in the processor's caches, and the same layer may
take half as long there (30M parameters in bf16: two layers of eight 0.23 ms, the other six 1.1 ms). So it is
taken as a function of how many layers run and of the parameters that they read. Uniform members of a few
depths and widths are decoded with; between them time rises in proportion. Members with unequal layers then
show how far off that is.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.base.errors import NestlingError
from models.base.stopwatch import Clock, alternate
from models.decode.sampling.params import SamplingParams
from models.decode.tune.timing import PLAIN_PASSES, PlainDecoding, rising
from models.elastic.config import ElasticConfig
from models.elastic.count import count_layer_parameters
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View

FORMAT = 2
NUM_PROMPT = 16
"""Tokens before those that are timed."""
NUM_DEPTHS = 8
"""Depths that are timed, at most, besides one layer."""
NUM_WIDTHS = 5
"""Widths that are timed, at most, spread evenly over the parameters of a layer."""
Curve = Mapping[int, float]
"""Parameters of a layer -> seconds of a decoded token, where all layers are such."""


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Seconds of a decoded token of uniform members.

    Args:
        machine: processor that it was measured on.
        dtype: dtype of the weights.
        shape: hidden size, neurons, groups, vocabulary and layers of the full model.
        depths: number of layers, one and all among them -> times of members of so many.
        residual: largest error on members that the table was not made of, as a fraction.

    Raises:
        ValueError: if members are missing, or a time is none.
    """

    machine: str
    dtype: str
    shape: tuple[int, ...]
    depths: Mapping[int, Curve]
    residual: float

    def __post_init__(self) -> None:
        if not all(self.depths.values()) or not {1, self.shape[-1]} <= set(self.depths):
            raise ValueError("members of one layer or of all are missing")
        seconds = [one for curve in self.depths.values() for one in curve.values()]
        if not all(0 < one < math.inf for one in seconds) or not 0 <= self.residual < math.inf:
            raise ValueError("a time is not above 0")

    def seconds(self, config: ElasticConfig, member: Granularity) -> float:
        """Return the seconds of a decoded token of a member."""
        layers = member.resolve(config).layers
        size, depths = count_layer_parameters(config, layers) / len(layers), sorted(self.depths)
        return float(np.interp(len(layers), depths, [_interpolate(self.depths[one], size) for one in depths]))

    def to_json(self) -> dict[str, Any]:
        """Return the table as what JSON can hold; `from_json` reads it back."""
        members = [
            {"layers": depth, "layer_parameters": size, "seconds": seconds}
            for depth, curve in self.depths.items()
            for size, seconds in curve.items()
        ]
        fields = {"machine": self.machine, "dtype": self.dtype, "shape": list(self.shape)}
        return {"format": FORMAT, **fields, "members": members, "residual": self.residual}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "LatencyTable":
        """Read what `to_json` gave.

        Raises:
            NestlingError: if it is no whole table.
        """
        try:
            if fields["format"] != FORMAT:
                raise ValueError("another release's")
            depths: dict[int, dict[int, float]] = {}
            for one in fields["members"]:
                depths.setdefault(int(one["layers"]), {})[int(one["layer_parameters"])] = float(
                    one["seconds"]
                )
            return LatencyTable(
                machine=str(fields["machine"]),
                dtype=str(fields["dtype"]),
                shape=tuple(map(int, fields["shape"])),
                depths=depths,
                residual=float(fields["residual"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise NestlingError(
                f"it is no table of latencies ({reason}); let this machine measure one"
            ) from None


def _interpolate(curve: Curve, size: float) -> float:
    sizes = sorted(curve)
    return float(np.interp(size, sizes, [curve[one] for one in sizes]))


def shape_of(config: ElasticConfig) -> tuple[int, ...]:
    """Return what a table of latencies is for."""
    widths = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    return *widths, config.vocab_size, config.num_hidden_layers


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
    """Decode with uniform members of this model, packed as it decodes, and make the table.

    Args:
        model: the model, packed.
        options: fractions of neurons and of groups, the full ones among them.
        checks: members that the table is compared with, not made of.
        machine: the processor's name.
        dtype: dtype of the weights.
        budget: seconds.
        clock: returns the time in seconds; on a busy machine that of the thread, which then must be one.
    """
    config, num = model.config, model.config.num_hidden_layers
    members = {}
    for depth in sorted({1, *(math.ceil(num * part / NUM_DEPTHS) for part in range(1, NUM_DEPTHS + 1))}):
        layers = None if depth == num else tuple(range(depth))
        for size, (ffn, heads) in _spread(config, options):
            members[depth, size] = Granularity(ffn=(ffn,), heads=(heads,), layers=layers)
    seconds = time_decoding(model, [*members.values(), *checks], budget=budget, clock=clock)
    depths: dict[int, dict[int, float]] = {depth: {} for depth, _ in members}
    for (depth, size), member in members.items():
        depths[depth][size] = seconds[member]
    # One busy moment shall not make a wider member faster than a narrower one.
    even = {depth: dict(zip(one, rising(one.values()), strict=True)) for depth, one in depths.items()}
    table = LatencyTable(machine=machine, dtype=dtype, shape=shape_of(config), depths=even, residual=0.0)
    errors = [abs(table.seconds(config, one) / seconds[one] - 1) for one in checks]
    return dataclasses.replace(table, residual=max(errors, default=0.0))


def _spread(
    config: ElasticConfig, options: Sequence[tuple[float, float]]
) -> list[tuple[int, tuple[float, float]]]:
    """Return a few options by the parameters of a layer, the smallest and the largest among them."""
    sizes = {
        count_layer_parameters(config, Granularity(ffn=(ffn,), heads=(heads,)).resolve(config).layers[:1]): (
            ffn,
            heads,
        )
        for ffn, heads in options
    }
    wanted = np.linspace(min(sizes), max(sizes), NUM_WIDTHS)
    nearest = {min(sizes, key=lambda size: abs(size - one)) for one in wanted}
    return sorted((size, sizes[size]) for size in nearest)


def time_decoding(
    model: ElasticLM, members: Iterable[Granularity], *, budget: float, clock: Clock
) -> dict[Granularity, float]:
    """Return the seconds of a decoded token of each member, greedily and without a draft."""
    decodings = {
        one: PlainDecoding(View(model, one), SamplingParams(), num_prompt=NUM_PROMPT)
        for one in dict.fromkeys(members)
    }
    works = {one: decoding.go_on for one, decoding in decodings.items()}
    before = {one: decoding.begin for one, decoding in decodings.items()}
    runs = alternate(works, budget=budget, clock=clock, before=before).median
    return {one: run / PLAIN_PASSES for one, run in runs.items()}
