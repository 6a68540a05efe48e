"""Members of a model that a search considers as drafts."""

from collections.abc import Iterable, Iterator

from models.elastic.config import ElasticConfig
from models.elastic.count import count_flops
from models.elastic.granularity import Granularity, Plan

NUM_CACHED = 64
"""Positions read, where operations are counted: about the middle of a short text."""
PREFIX_LAYERS = (1, 2, 3, 4, 6, 8)
"""Numbers of first layers that are considered as drafts (early exits)."""


def list_candidates(config: ElasticConfig, more: Iterable[Granularity] = ()) -> list[Granularity]:
    """List members that may draft well, each once, the cheapest first, without the full model.

    Prefixes of the layers up to half of them, at full width and narrower (FFN, heads, and a first layer
    wider than the rest), the first layers with the last one, all layers with a narrow FFN; and `more`.
    """
    found: dict[Plan, Granularity] = {}
    for granularity in (*more, *_members(config)):
        plan = granularity.resolve(config)
        if not plan.is_full:
            found.setdefault(plan, granularity)
    return sorted(found.values(), key=lambda one: count_flops(config, one, num_cached=NUM_CACHED))


def _members(config: ElasticConfig) -> Iterator[Granularity]:
    num_layers = config.num_hidden_layers
    half_heads = (0.5,) if config.num_key_value_heads % 2 == 0 else (1.0,)
    for count in sorted({min(count, num_layers // 2) for count in PREFIX_LAYERS} - {0}):
        layers = tuple(range(count))
        yield Granularity(layers=layers)
        for fraction in (0.5, 0.25):
            yield Granularity(layers=layers, ffn=(fraction,))
        yield Granularity(layers=layers, ffn=(0.5,), heads=half_heads)
        if count > 1:
            yield Granularity(layers=layers, ffn=(1.0, *[0.5] * (count - 1)))
            yield Granularity(layers=layers, ffn=(1.0, *[0.25] * (count - 1)))
            yield Granularity(layers=(*layers[:-1], num_layers - 1))
    for fraction in (0.125, 0.25):
        yield Granularity(ffn=(fraction,))
        yield Granularity(ffn=(fraction,), heads=half_heads)
