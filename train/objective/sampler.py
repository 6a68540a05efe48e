"""The choice of the members that train on each row of a step: a pure function of (seed, step).

    rows      one full pass; early exits train from its states at one position of a few, the other members
              divide a fraction of the rows among themselves
    all       every member on every row, the sum of losses (MatFormer, 2310.07707, section 3.2)
    random    one member a step, drawn with given probabilities
    sandwich  the full model, the smallest member and some random ones (https://arxiv.org/abs/1903.05134)

Rows and positions are counted over the whole optimizer step, so that splitting it into micro-batches or
over processes changes nothing. An exit is a member that is a prefix of the layers at full width (early exit,
LayerSkip, https://arxiv.org/abs/2404.16710).
"""

import math
import random
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from models.elastic.config import ElasticConfig
from models.elastic.count import count_layer_parameters
from models.elastic.granularity import Granularity, Plan, spread
from train.recipe.sections import SamplerConfig


@dataclass(frozen=True)
class Mixture:
    """What makes another member of a slot's.

    Args:
        larger: The member that gives some of its layers.
        places: Which of the layers that run these are.
    """

    larger: str
    places: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One member's part of a step.

    Args:
        name: The member.
        rows: The rows of the step that it trains on.
        weight: Factor of its summed loss.
        shift: None to read its own keys and values; else it trains on the shared cache, in blocks
            whose first one is this many positions short.
        mixture: None for the member itself.
    """

    name: str
    rows: range
    weight: float = 1.0
    shift: int | None = None
    mixture: Mixture | None = None

    def granularity(self, members: Mapping[str, Granularity], num_layers: int) -> Granularity:
        """Return what trains here, in a family and a model of so many layers."""
        own = members[self.name]
        if self.mixture is None:
            return own
        num_run = num_layers if own.layers is None else len(own.layers)
        return mix(own, members[self.mixture.larger], self.mixture.places, num_run)


@dataclass(frozen=True)
class StepPlan:
    """The students of one optimizer step.

    Args:
        full: Factor of the full model's own loss; 0: it does not train.
        exits: Members that train from the full pass's states.
        slots: Members that run a pass of their own.
        exit_stride: Distance between the positions at which exits train; it divides the row.
        exit_offset: The first of these positions.
        exit_weight: Factor of an exit's summed loss.
    """

    full: float
    exits: tuple[str, ...]
    slots: tuple[Slot, ...]
    exit_stride: int = 1
    exit_offset: int = 0
    exit_weight: float = 1.0


def plan_step(
    members: Mapping[str, Plan],
    config: SamplerConfig,
    *,
    seed: int,
    step: int,
    num_rows: int,
    weight: float = 1.0,
    full: float = 1.0,
) -> StepPlan:
    """Plan a step for the members, the full model among them; all losses but its own get the weight.

    A full model whose own loss has the factor 0 teaches its members all the same.

    >>> from models.elastic.config import ElasticConfig
    >>> from models.elastic.granularity import Granularity
    >>> shape = ElasticConfig(
    ...     vocab_size=8,
    ...     hidden_size=16,
    ...     intermediate_size=32,
    ...     num_hidden_layers=4,
    ...     num_attention_heads=4,
    ...     num_key_value_heads=2,
    ... )
    >>> texts = {"S": "ffn=0.25", "D": "layers=0-1", "XL": "full"}
    >>> plans = {name: Granularity.parse(text).resolve(shape) for name, text in texts.items()}
    >>> config = SamplerConfig(
    ...     kind="rows", row_fraction=0.5, weight_power=0.5, shared_cache=0.0, exit_stride=4
    ... )
    >>> plan = plan_step(plans, config, seed=0, step=0, num_rows=8)
    >>> plan.slots
    (Slot(name='S', rows=range(0, 4), weight=1.4142135623730951, shift=None, mixture=None),)
    >>> plan.exits, plan.exit_stride, plan.exit_weight
    (('D',), 4, 2.0)
    """
    rng = random.Random(f"members {seed} {step}")  # text seeds it alike in every process
    widest = next(name for name, plan in members.items() if plan.is_full)
    others = [name for name, plan in members.items() if not plan.is_full]
    everyone = range(num_rows)
    if config.kind == "random":
        names = [*others, widest] if full else others
        if not names:
            return StepPlan(full=full, exits=(), slots=())
        weights = [(config.probabilities or {}).get(name, 0.0) for name in names]
        chosen = rng.choices(names, weights if any(weights) else None)[0]  # None: all alike
        if chosen == widest:
            return StepPlan(full=full, exits=(), slots=())
        return StepPlan(full=0.0, exits=(), slots=(_slot(chosen, everyone, num_rows, config, rng, weight),))
    if config.kind == "sandwich":
        # the smallest first: it trains in every step
        others.sort(key=lambda name: sum(layer.ffn + layer.groups for layer in members[name].layers))
        picked = rng.sample(others[1:], min(config.num_random, len(others[1:])))
        others = others[:1] + picked
    exits = tuple(name for name in others if members[name].is_layer_prefix)
    narrow = [name for name in others if name not in exits]
    rows_of = dict.fromkeys(narrow, everyone)
    if config.kind == "rows":
        # `row_fraction` of the rows, in slots of `min_rows`: 1/16 of 16 rows is a slot of 4 in every 4th step
        most = max(1, num_rows // config.min_rows)
        turns = config.turns or {}
        cycle = [name for name in narrow for _ in range(turns.get(name, 1))]
        counts = _count_slots(cycle, config.row_fraction * most, seed, step)
        rows_of = _divide(counts, most, num_rows)
    slots = tuple(_slot(name, rows, num_rows, config, rng, weight) for name, rows in rows_of.items())
    if config.kind == "rows" and config.mixed_fraction:
        slots = tuple(_draw_mixture(slot, members, config.mixed_fraction, rng) for slot in slots)
    every = config.exit_stride if config.kind == "rows" else 1
    return StepPlan(
        full=full,
        exits=exits,
        slots=slots,
        exit_stride=every,
        exit_offset=rng.randrange(every),
        exit_weight=weight * every**config.weight_power,  # N/n of `_slot` is the stride here
    )


def mix(member: Granularity, other: Granularity, places: Collection[int], num_layers: int) -> Granularity:
    """Return a member with some of its layers as wide as those of another (Mix'n'Match, 2310.07707, 3.3).

    Args:
        member: The member.
        other: One that runs the same layers.
        places: Which of the layers that run are the other's.
        num_layers: How many run.

    >>> str(mix(Granularity.parse("ffn=0.25"), Granularity.parse("full"), [1, 2], 3))
    'ffn=0.25:1:1'
    """

    def mixed(ours: tuple[float, ...], theirs: tuple[float, ...]) -> tuple[float, ...]:
        pairs = zip(spread(ours, num_layers), spread(theirs, num_layers), strict=True)
        return tuple(pair[place in places] for place, pair in enumerate(pairs))

    ffn, heads = mixed(member.ffn, other.ffn), mixed(member.heads, other.heads)
    return Granularity(ffn=ffn, heads=heads, layers=member.layers)


def resolve_turns(
    sampler: SamplerConfig, members: Mapping[str, Granularity], config: ElasticConfig
) -> SamplerConfig:
    """Return the sampler with `turns` for each narrow member of the model, as `turns_power` says.

    >>> config = ElasticConfig(
    ...     vocab_size=8,
    ...     hidden_size=16,
    ...     intermediate_size=64,
    ...     num_hidden_layers=4,
    ...     num_attention_heads=4,
    ...     num_key_value_heads=2,
    ... )
    >>> members = {name: Granularity.parse(f"ffn={ffn}") for name, ffn in {"S": 0.125, "L": 0.5}.items()}
    >>> resolve_turns(SamplerConfig(turns_power=1.0), members, config).turns
    {'S': 2, 'L': 1}
    """
    plans = {name: granularity.resolve(config) for name, granularity in members.items()}
    sizes = {
        name: count_layer_parameters(config, plan.layers)
        for name, plan in plans.items()
        if not plan.is_layer_prefix
    }
    if sampler.turns is not None or sampler.kind != "rows" or not sizes:
        return sampler
    most = max(sizes.values())
    parts = {name: (most / size) ** sampler.turns_power for name, size in sizes.items()}
    # Whole numbers that are small make a short cycle: 3 for the largest member are near enough.
    turns = {name: round(3 * part) for name, part in parts.items()}
    divisor = math.gcd(*turns.values())
    return replace(sampler, turns={name: count // divisor for name, count in turns.items()})


def _count_slots(names: list[str], slots_per_step: float, seed: int, step: int) -> Counter[str]:
    """Count each member's slots in a step, in the order of the first ones; with few slots a step, often none.

    A member has a slot in a cycle for each time that it is named, in an order drawn for each cycle: in
    a fixed order, every n-th step, which the log shows, might have the same member forever.
    """
    # The slots of a run are numbered through; a fraction of a slot a step adds up to one now and then.
    number, last = (math.floor(count * slots_per_step) for count in (step, step + 1))
    counts: Counter[str] = Counter()
    while names and number < last:
        cycle, index = divmod(number, len(names))
        whole = (last - number) // len(names)
        if whole and index == 0 and len(counts) == len(set(names)):  # whole cycles change no order
            for name in names:
                counts[name] += whole
            number += whole * len(names)
            continue
        order = random.Random(f"turns {seed} {cycle}").sample(names, len(names))
        taken = order[index : index + last - number]
        counts.update(taken)
        number += len(taken)
    return counts


def _divide(counts: Counter[str], most: int, num_rows: int) -> dict[str, range]:
    """Divide the step's rows, a slot being one of `most` parts of them and those of a member side by side."""
    ends = [0, *accumulate(counts.values())]
    rows = [end * num_rows // most for end in ends]
    return {name: range(*span) for name, span in zip(counts, pairwise(rows), strict=True)}


def _slot(
    name: str, rows: range, num_rows: int, config: SamplerConfig, rng: random.Random, weight: float
) -> Slot:
    """Weigh a member's rows and draw how it reads.

    The sum over n of N rows has 1/N of a full sum's gradient noise for each row, so a factor of
    sqrt(N/n) lets every member add as much noise as the full model does; N/n, its mean, would let
    a member on few rows drown it.
    """
    shared = rng.random() < config.shared_cache
    shift = rng.randrange(config.block)
    weight *= (num_rows / len(rows)) ** config.weight_power
    return Slot(name, rows, weight, shift if shared else None)


def _draw_mixture(slot: Slot, members: Mapping[str, Plan], fraction: float, rng: random.Random) -> Slot:
    """Return the slot, or now and then that of a mixture of its member and the next larger one.

    Half of the mixtures are wide in their last layers, as the best members of a budget often are, the others
    anywhere.
    """
    plan = members[slot.name]
    larger = [name for name, one in members.items() if _is_wider(one, plan)]
    if not larger or rng.random() >= fraction:
        return slot
    nearest = min(larger, key=lambda name: sum(layer.ffn + layer.groups for layer in members[name].layers))
    pairs = zip(plan.layers, members[nearest].layers, strict=True)
    differing = [place for place, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if len(differing) < 2:  # with that one as wide as the other's it is the other
        return slot
    count = rng.randrange(1, len(differing))
    last = differing[len(differing) - count :]
    places = last if rng.random() < 0.5 else sorted(rng.sample(differing, count))
    return replace(slot, mixture=Mixture(nearest, tuple(places)))


def _is_wider(plan: Plan, other: Plan) -> bool:
    return plan != other and len(plan.layers) == len(other.layers) and plan.contains(other)
