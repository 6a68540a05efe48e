"""Which drafts a search considers: members of a model that may draft well, as texts that `--draft` takes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from models.elastic.config import ElasticConfig
from models.elastic.count import count_flops
from models.elastic.granularity import Granularity, Plan

NUM_CACHED = 64
"""Positions read, where operations are counted: about the middle of a short text."""
COUNTS = (1, 2, 3, 4, 6, 8)
"""Of layers, in prefixes of them."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A draft: a member, its precision if that is not the target's own, and how many tokens it may draft."""

    granularity: Granularity
    precision: str | None = None
    num_tokens: int | None = None
    """The most frequent ones; None for all."""

    @property
    def draft(self) -> str:
        """As `--draft` takes it, apart from the vocabulary."""
        return f"{self.granularity}@{self.precision}" if self.precision else str(self.granularity)

    def __str__(self) -> str:
        return self.draft if self.num_tokens is None else f"{self.draft}, {self.num_tokens} tokens"


def list_candidates(config: ElasticConfig, more: Iterable[Granularity] = ()) -> list[Granularity]:
    """Members that may draft well, each once, the cheapest first; the full model is none of them.

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
    for count in sorted({min(count, num_layers // 2) for count in COUNTS} - {0}):
        layers = tuple(range(count))
        yield Granularity(layers=layers)
        for share in (0.5, 0.25):
            yield Granularity(layers=layers, ffn=(share,))
        yield Granularity(layers=layers, ffn=(0.5,), heads=half_heads)
        if count > 1:
            yield Granularity(layers=layers, ffn=(1.0, *[0.5] * (count - 1)))
            yield Granularity(layers=layers, ffn=(1.0, *[0.25] * (count - 1)))
            yield Granularity(layers=(*layers[:-1], num_layers - 1))
    for share in (0.125, 0.25):
        yield Granularity(ffn=(share,))
        yield Granularity(ffn=(share,), heads=half_heads)
