"""A granularity: one member of the family, as a frozen value.

For each axis it says how much of the full model the member keeps: `ffn` (a prefix of a layer's hidden
neurons), `heads` (a prefix of its key/value groups) and `layers` (which layers run). It is always an
argument, never global state. Resolved against a model's shape it becomes a `Plan` of absolute widths.

The idea is MatFormer's (https://arxiv.org/abs/2310.07707, section 3): every smaller block is a prefix
of the larger one; a granularity whose layers differ from each other is its Mix'n'Match (section 3.3).
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig


class Shape(Protocol):
    """The numbers of a full model that a granularity is resolved against."""

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the full model."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Hidden neurons of each layer's feed-forward part."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """Key/value groups of each layer."""
        ...


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a member: its index in the full model and its absolute widths."""

    index: int
    ffn: int
    groups: int

    def shapes(self, config: ElasticConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the layer by name, which is a prefix of the full model's tensor.

        This table is the one place that says which part of a layer a member has.

        >>> config = ElasticConfig(
        ...     vocab_size=8,
        ...     hidden_size=16,
        ...     intermediate_size=32,
        ...     num_hidden_layers=4,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> shapes = LayerPlan(index=3, ffn=8, groups=1).shapes(config)
        >>> shapes["self_attn.q_proj.weight"], shapes["mlp.down_proj.weight"]
        ((8, 16), (16, 8))
        """
        size, head = config.hidden_size, config.head_dim
        keys = self.groups * head
        queries = keys * config.heads_per_group
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (size,)}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"self_attn.{name}_proj.weight"] = (rows, size)
            if config.attention_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (rows,)
        shapes["self_attn.o_proj.weight"] = (size, queries)
        if config.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        norms = ["post_attention_layernorm"]
        if config.post_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{name}.weight": (size,) for name in norms}
        shapes |= {f"mlp.{name}_proj.weight": (self.ffn, size) for name in ("gate", "up")}
        return shapes | {"mlp.down_proj.weight": (size, self.ffn)}


@dataclass(frozen=True)
class Plan:
    """A granularity resolved against a full model: the layers that run, in order."""

    layers: tuple[LayerPlan, ...]
    num_layers: int
    ffn: int
    groups: int

    @functools.cached_property
    def is_full(self) -> bool:
        """True for the full model."""
        return len(self.layers) == self.num_layers and self.is_full_width

    @functools.cached_property
    def is_full_width(self) -> bool:
        """True if every layer that runs keeps all its neurons and heads."""
        return all((layer.ffn, layer.groups) == (self.ffn, self.groups) for layer in self.layers)

    @functools.cached_property
    def is_uniform(self) -> bool:
        """True if all layers that run have equal widths, so that a stock architecture holds them."""
        return len({(layer.ffn, layer.groups) for layer in self.layers}) == 1

    @functools.cached_property
    def is_layer_prefix(self) -> bool:
        """True for the first layers at full width: an early exit of the full model's own pass."""
        return self.is_full_width and all(
            position == layer.index for position, layer in enumerate(self.layers)
        )

    def contains(self, other: "Plan") -> bool:
        """Return whether the other member's weights are a subset of this one's (invariant 3)."""
        mine = {layer.index: layer for layer in self.layers}
        return all(
            layer.index in mine
            and layer.ffn <= mine[layer.index].ffn
            and layer.groups <= mine[layer.index].groups
            for layer in other.layers
        )


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """The fraction of the full model that a member keeps, for each axis.

    Args:
        ffn: fraction of a layer's hidden neurons; one for all kept layers, or one per kept layer.
        heads: fraction of a layer's key/value groups; the same rule.
        layers: the layers that run, ascending; None for all.

    Raises:
        UsageError: if a fraction is outside (0, 1] or the lists do not agree.

    >>> str(Granularity.parse("ffn=0.25,heads=0.5,layers=0:3:5"))
    'ffn=0.25,heads=0.5,layers=0:3:5'
    >>> Granularity.parse("layers=0-2:5").layers
    (0, 1, 2, 5)
    >>> str(Granularity.parse("ffn=1"))
    'full'
    """

    ffn: tuple[float, ...] = (1.0,)
    heads: tuple[float, ...] = (1.0,)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for axis in ("ffn", "heads"):
            fractions: tuple[float, ...] = getattr(self, axis)
            if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
                raise UsageError(
                    f"granularity: {axis}={_join(fractions)} is not a fraction; "
                    "give numbers above 0 and up to 1"
                )
            if len(set(fractions)) == 1:
                object.__setattr__(self, axis, fractions[:1])
        if self.layers is not None:
            _check_layers(self.layers)
        lengths = {len(fractions) for fractions in (self.ffn, self.heads) if len(fractions) > 1}
        if self.layers is not None:
            lengths.add(len(self.layers)) if lengths else None
        if len(lengths) > 1:
            raise UsageError(
                f"granularity: {self} lists {_join(sorted(lengths), ' and ')} layers; "
                "a list has one fraction for each layer that runs"
            )

    @staticmethod
    def parse(text: str, family: Mapping[str, "Granularity"] | None = None) -> "Granularity":
        """Read a name of the family, `full`, or a written-out granularity.

        Raises:
            UsageError: naming what does not parse and what would.
        """
        family = DEFAULT_FAMILY if family is None else family
        text = text.strip()
        if text in family:
            return family[text]
        if text == "full":
            return FULL
        if "=" not in text:
            names = ", ".join(dict.fromkeys([*family, "full"]))
            raise UsageError(
                f"granularity: {text!r} is not a member of the family; choose from "
                f"{names}, or write it out as in ffn=0.25,heads=0.5,layers=0:3:5"
            )
        axes: dict[str, str] = {}
        for part in text.split(","):
            axis, _, value = part.partition("=")
            if axis.strip() not in ("ffn", "heads", "layers") or axis.strip() in axes:
                raise UsageError(
                    f"granularity: {part!r} in {text!r} is not an axis; "
                    "the axes are ffn, heads and layers, each at most once"
                )
            axes[axis.strip()] = value
        return Granularity(
            ffn=_parse_fractions("ffn", axes.get("ffn", "1")),
            heads=_parse_fractions("heads", axes.get("heads", "1")),
            layers=_parse_layers(axes["layers"]) if "layers" in axes else None,
        )

    def __str__(self) -> str:
        parts = [
            f"{axis}={_join(fractions)}"
            for axis, fractions in (("ffn", self.ffn), ("heads", self.heads))
            if fractions != (1.0,)
        ]
        if self.layers is not None:
            parts.append(f"layers={_join(_runs(self.layers))}")
        return ",".join(parts) or "full"

    def resolve(self, shape: Shape) -> Plan:
        """Turn fractions into absolute widths of a full model.

        An FFN width is rounded to the nearest neuron; heads must come out whole, since half a
        key/value group means nothing.

        Raises:
            UsageError: if the layers or heads do not fit the model.

        >>> config = ElasticConfig(
        ...     vocab_size=8,
        ...     hidden_size=16,
        ...     intermediate_size=32,
        ...     num_hidden_layers=4,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> Granularity.parse("ffn=0.5,layers=0:3").resolve(config).layers
        (LayerPlan(index=0, ffn=16, groups=2), LayerPlan(index=3, ffn=16, groups=2))
        """
        return _resolve(self, shape.num_hidden_layers, shape.intermediate_size, shape.num_key_value_heads)


FULL = Granularity()
DEFAULT_FAMILY: Mapping[str, Granularity] = {
    "S": Granularity(ffn=(0.125,)),
    "M": Granularity(ffn=(0.25,)),
    "L": Granularity(ffn=(0.5,)),
    "XL": FULL,
}


MOST_LAYERS = 10_000
"""More layers than any model has."""


@functools.lru_cache(maxsize=4096)
def _resolve(granularity: Granularity, num_layers: int, ffn: int, groups: int) -> Plan:
    indices = granularity.layers if granularity.layers is not None else tuple(range(num_layers))
    if indices[-1] >= num_layers:
        raise UsageError(
            f"granularity: {granularity} keeps layer {indices[-1]}, "
            f"but this model's layers are 0 to {num_layers - 1}"
        )
    for axis, fractions in (("ffn", granularity.ffn), ("heads", granularity.heads)):
        if len(fractions) not in (1, len(indices)):
            raise UsageError(
                f"granularity: {axis}={_join(fractions)} lists {len(fractions)} layers, "
                f"but {len(indices)} run; give one fraction, or one for each of them"
            )
    layers = tuple(
        LayerPlan(
            index=index, ffn=max(1, round(ffn * ffn_fraction)), groups=_whole_groups(heads_fraction, groups)
        )
        for index, ffn_fraction, heads_fraction in zip(
            indices,
            spread(granularity.ffn, len(indices)),
            spread(granularity.heads, len(indices)),
            strict=True,
        )
    )
    return Plan(layers=layers, num_layers=num_layers, ffn=ffn, groups=groups)


def _whole_groups(fraction: float, groups: int) -> int:
    kept = fraction * groups
    if abs(kept - round(kept)) > 1e-6 * groups or round(kept) < 1:
        fitting = _join([f"{count / groups:g}" for count in range(1, groups + 1)], ", ")
        raise UsageError(
            f"granularity: heads={fraction:g} keeps {kept:g} of {groups} key/value groups; "
            f"fractions that fit this model are {fitting}"
        )
    return round(kept)


def spread(fractions: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return the fraction of each of `count` layers."""
    return fractions * count if len(fractions) == 1 else fractions


def _parse_fractions(axis: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(fraction) for fraction in text.split(":"))
    except ValueError:
        raise UsageError(
            f"granularity: {axis}={text} is not a fraction or a list of fractions; "
            f"write {axis}=0.5 or {axis}=1:0.5:0.25"
        ) from None


def _parse_layers(text: str) -> tuple[int, ...]:
    layers: list[int] = []
    try:
        for item in text.split(":"):
            first, _, last = item.partition("-")
            end = min(int(last or first), MOST_LAYERS)  # a typing error must not fill the memory
            layers.extend(range(int(first), end + 1))
    except ValueError:
        layers = []
    if MOST_LAYERS in layers:
        raise UsageError(f"granularity: layers={text} goes beyond {MOST_LAYERS} layers, which no model has")
    if not layers:
        raise UsageError(
            f"granularity: layers={text} is not a list of layers; write layers=0:3:5 or layers=0-3"
        )
    return tuple(layers)


def _check_layers(layers: tuple[int, ...]) -> None:
    if not layers or layers[0] < 0 or any(b <= a for a, b in itertools.pairwise(layers)):
        raise UsageError(f"granularity: layers={_join(layers)} must be different layers in ascending order")


def _runs(layers: tuple[int, ...]) -> list[str]:
    """Write consecutive layers as `first-last`, the shortest text that parses back."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _join(items: Sequence[float | str], by: str = ":") -> str:
    return by.join(item if isinstance(item, str) else _number(item) for item in items)


def _number(value: float) -> str:
    """Return the shortest text that reads back as the same number.

    >>> [_number(value) for value in (1.0, 0.25, 1 / 3)]
    ['1', '0.25', '0.3333333333333333']
    """
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
