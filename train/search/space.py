"""The members that a search under a budget may choose: an option for each layer, over some sets of layers."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity

FALLBACK = (0.25, 0.5, 0.75, 1.0)
"""FFN fractions where a family has none of its own."""
LOOSE = 8
"""Widths in between are multiples of this where nothing asks for more."""
Layers = tuple[int, ...]


@dataclass(frozen=True, order=True)
class Option:
    """Widths of a layer, as fractions of the full model's."""

    ffn: float
    heads: float


@dataclass(frozen=True)
class Choice:
    """A member: which layers run, and the option of each."""

    layers: Layers
    options: tuple[Option, ...]

    def member(self, num_layers: int) -> Granularity:
        """Return the granularity."""
        return Granularity(
            ffn=tuple(option.ffn for option in self.options),
            heads=tuple(option.heads for option in self.options),
            layers=None if len(self.layers) == num_layers else self.layers,
        )


@dataclass(frozen=True, kw_only=True)
class Space:
    """Options of a layer, and how unequal layers may be.

    Args:
        num_layers: layers of the full model.
        ffn: fractions of the neurons, ascending, the last one 1.
        heads: fractions of the groups, likewise.
        trained_ffn: those that some trained member has.
        unequal_ffn: whether layers may differ in neurons.
        unequal_heads: whether they may differ in groups.
    """

    num_layers: int
    ffn: tuple[float, ...]
    heads: tuple[float, ...]
    trained_ffn: tuple[float, ...]
    unequal_ffn: bool = True
    unequal_heads: bool = True

    @staticmethod
    def of(
        config: ElasticConfig,
        family: Iterable[Granularity],
        *,
        unequal: tuple[bool, bool] = (True, True),
        multiple: int = LOOSE,
    ) -> "Space":
        """Return the space of a family: trained widths, and FFN widths half-way between two of them.

        Args:
            config: the full model's shape.
            family: its members.
            unequal: whether layers may differ in neurons, and in groups.
            multiple: neurons of widths in between come in multiples of this; above `LOOSE` of all widths.
        """
        family = list(family)
        trained = sorted({1.0, *(fraction for one in family for fraction in one.ffn)})
        trained = trained if len(trained) > 1 else list(FALLBACK)
        width = config.intermediate_size
        if multiple > LOOSE:  # a format of whole blocks holds no other widths
            trained = [one for one in trained if one == 1 or round(one * width) % multiple == 0]
        between = {
            fraction
            for low, high in itertools.pairwise(trained)
            if low < (fraction := round(width * (low + high) / 2 / multiple) * multiple / width) < high
        }
        return Space(
            num_layers=config.num_hidden_layers,
            ffn=tuple(sorted({*trained, *between})),
            heads=tuple(sorted({1.0, *(fraction for one in family for fraction in one.heads)})),
            trained_ffn=tuple(trained),
            unequal_ffn=unequal[0],
            unequal_heads=unequal[1],
        )

    @property
    def all_layers(self) -> Layers:
        """Every layer."""
        return tuple(range(self.num_layers))

    @property
    def options(self) -> tuple[Option, ...]:
        """Every option of a layer, the full one last."""
        return tuple(Option(*pair) for pair in itertools.product(self.ffn, self.heads))

    @property
    def least(self) -> Option:
        """The narrowest option."""
        return self.options[0]

    @property
    def full(self) -> Option:
        """The option of full width."""
        return self.options[-1]

    def groups_of_options(self) -> Iterator[tuple[Option, ...]]:
        """Yield sets of options of which the layers of one member may have any."""
        by_ffn = [tuple(Option(ffn, heads) for heads in self.heads) for ffn in self.ffn]
        by_heads = [tuple(Option(ffn, heads) for ffn in self.ffn) for heads in self.heads]
        match self.unequal_ffn, self.unequal_heads:
            case True, True:
                yield self.options
            case True, False:
                yield from by_heads
            case False, True:
                yield from by_ffn
            case _:
                yield from ((option,) for option in self.options)

    def uniform(self, layers: Layers, option: Option) -> Choice:
        """Return the member whose layers are equal."""
        return Choice(layers, (option,) * len(layers))

    def except_for(self, layer: int, option: Option, others: Option) -> Choice:
        """Return the member of all layers of which one has an option of its own."""
        return Choice(
            self.all_layers, tuple(option if i == layer else others for i in range(self.num_layers))
        )

    def heuristics(self) -> list[Choice]:
        """Return the paper's Mix'n'Match: widths that never fall with depth and rise by one trained step.

        MatFormer, https://arxiv.org/abs/2310.07707, section 3.3.
        """
        if not self.unequal_ffn:
            return []
        found = []
        for low, high in itertools.pairwise(self.trained_ffn):
            for narrow in range(1, self.num_layers):
                widths = [low] * narrow + [high] * (self.num_layers - narrow)
                found.append(Choice(self.all_layers, tuple(Option(ffn, 1.0) for ffn in widths)))
        return found

    def choice_of(self, member: Granularity) -> Choice:
        """Return a granularity as a choice; its widths need not be among the options."""
        layers = self.all_layers if member.layers is None else member.layers

        def spread(fractions: Sequence[float]) -> Sequence[float]:
            return list(fractions) * len(layers) if len(fractions) == 1 else fractions

        pairs = zip(spread(member.ffn), spread(member.heads), strict=True)
        return Choice(layers, tuple(Option(*pair) for pair in pairs))
