import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.elastic.config import ElasticConfig
from models.elastic.count import count_layer_parameters
from models.elastic.granularity import FULL, Granularity, Plan
from train.objective import sampler
from train.objective.sampler import StepPlan, plan_step, resolve_turns
from train.recipe.sections import SamplerConfig

SHAPE = ElasticConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TEXTS = {"S": "ffn=0.125", "M": "ffn=0.25", "L": "ffn=0.5", "D": "layers=0-1", "XL": "full"}
PLANS: dict[str, Plan] = {name: Granularity.parse(text).resolve(SHAPE) for name, text in TEXTS.items()}


def plan(kind: str, step: int = 0, num_rows: int = 16, **settings: object) -> StepPlan:
    config = SamplerConfig(kind=kind, **settings)  # type: ignore[arg-type]
    return plan_step(PLANS, config, seed=0, step=step, num_rows=num_rows)


@given(
    step=st.integers(0, 10**6),
    slots=st.integers(1, 16),
    size=st.integers(1, 8),
    share=st.floats(0.05, 1.0),
)
def test_rows_hands_out_the_share_without_overlap(step: int, slots: int, size: int, share: float) -> None:
    num_rows = slots * size
    made = plan("rows", step, num_rows, row_fraction=share, min_rows=size)
    rows = [row for slot in made.slots for row in slot.rows]
    assert abs(len(rows) - share * num_rows) < size
    assert {len(slot.rows) % size for slot in made.slots} <= {0}
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(range(num_rows))
    assert made.full
    assert made.exits == ("D",)


@pytest.mark.parametrize("num_rows", range(1, 20))
def test_all_rows_are_all_rows_whatever_members_wait_for(num_rows: int) -> None:
    rows = [row for slot in plan("rows", 3, num_rows, row_fraction=1.0).slots for row in slot.rows]
    assert sorted(rows) == list(range(num_rows))


def test_less_than_a_row_a_step_is_none_in_some_steps() -> None:
    plans = [plan("rows", s, num_rows=4, row_fraction=0.125, min_rows=1) for s in range(8)]
    assert [sum(len(slot.rows) for slot in made.slots) for made in plans] == [0, 1] * 4


def test_a_member_waits_until_its_rows_have_come_together() -> None:
    plans = [plan("rows", step, row_fraction=1 / 16, min_rows=4) for step in range(24)]
    slots = [[(slot.name, len(slot.rows)) for slot in made.slots] for made in plans]
    names, counts = zip(*(slot for step in slots for slot in step), strict=True)
    assert set(counts) == {4}
    assert [sorted(names[:3]), sorted(names[3:])] == [["L", "M", "S"]] * 2
    assert [bool(step) for step in slots] == [False, False, False, True] * 6


def test_members_have_rows_by_their_turns() -> None:
    for fraction in (1 / 16, 0.5, 1.0):
        plans = [plan("rows", step, row_fraction=fraction, min_rows=1, turns={"S": 3}) for step in range(160)]
        rows: Counter[str] = Counter()
        for made in plans:
            rows.update({slot.name: len(slot.rows) for slot in made.slots})
            taken = [row for slot in made.slots for row in slot.rows]
            assert len(taken) == len(set(taken))
        assert rows["S"] == pytest.approx(3 * rows["M"], abs=6)
        assert rows["M"] == pytest.approx(rows["L"], abs=3)


def test_a_member_of_half_the_size_has_twice_the_rows() -> None:
    members = {name: Granularity.parse(text) for name, text in {"S": "ffn=0.25", "D": "layers=0"}.items()}
    members["H"] = Granularity.parse("layers=1-2")
    members["XL"] = FULL
    sizes = {name: count_layer_parameters(SHAPE, one.resolve(SHAPE).layers) for name, one in members.items()}
    for power in (0.0, 1.0, 2.0):
        turns = resolve_turns(SamplerConfig(turns_power=power), members, SHAPE).turns
        assert turns is not None
        assert set(turns) == {"S", "H"}, "early exits take no rows"
        ratio = (sizes["H"] / sizes["S"]) ** power
        assert turns["S"] / turns["H"] == pytest.approx(ratio, rel=0.25)


def test_turns_by_name_stand() -> None:
    chosen = SamplerConfig(turns={"S": 7})
    assert resolve_turns(chosen, {"S": Granularity.parse("ffn=0.25")}, SHAPE) == chosen


def test_no_stride_of_steps_sees_the_same_member_for_ever() -> None:
    for stride in (4, 8, 12, 20):
        plans = [
            plan("rows", step, row_fraction=1 / 16, min_rows=4) for step in range(3, 60 * stride, stride)
        ]
        assert {slot.name for made in plans for slot in made.slots} == {"S", "M", "L"}, stride


def test_a_turn_is_at_most_a_whole_step() -> None:
    plans = [plan("rows", step, num_rows=2, row_fraction=0.5, min_rows=8) for step in range(6)]
    assert [[len(slot.rows) for slot in made.slots] for made in plans] == [[], [2]] * 3


def test_with_fewer_rows_than_members_each_gets_its_turn() -> None:
    counts = Counter(
        slot.name
        for step in range(30)
        for slot in plan("rows", step, num_rows=4, row_fraction=0.25, min_rows=1).slots
    )
    assert counts == {"S": 10, "M": 10, "L": 10}


def test_all_trains_everyone_on_every_row() -> None:
    made = plan("all")
    assert {slot.name: slot.rows for slot in made.slots} == dict.fromkeys("SML", range(16))
    assert made.exits == ("D",)
    assert made.full


def test_random_follows_its_probabilities() -> None:
    """2,000 draws; 5 sigma around the expectation: under one false alarm in 10^6 seeds."""
    counts: Counter[str] = Counter()
    for step in range(2000):
        made = plan("random", step, probabilities={"S": 0.5, "XL": 0.25, "D": 0.25})
        assert made.full == (not made.slots)
        counts[made.slots[0].name if made.slots else "XL"] += 1
    assert set(counts) == {"S", "XL", "D"}
    assert abs(counts["S"] - 1000) < 5 * (2000 * 0.25) ** 0.5


def test_random_without_probabilities_is_uniform_over_all_members() -> None:
    names = {made.slots[0].name if made.slots else "XL" for made in (plan("random", s) for s in range(200))}
    assert names == set(PLANS)


def test_sandwich_trains_the_full_model_the_smallest_member_and_random_ones() -> None:
    seen = set()
    for step in range(50):
        made = plan("sandwich", step, num_random=1)
        names = [*made.exits, *(slot.name for slot in made.slots)]
        assert made.full
        assert "S" in names
        assert len(names) == 2
        seen |= set(names)
    assert seen == {"S", "M", "L", "D"}


def test_exits_learn_at_a_share_of_the_positions_and_every_position_has_its_turn() -> None:
    plans = [plan("rows", step, exit_stride=4, weight_power=0.5) for step in range(100)]
    assert {made.exit_stride for made in plans} == {4}
    assert {made.exit_weight for made in plans} == {2.0}
    assert {made.exit_offset for made in plans} == {0, 1, 2, 3}
    assert plan("all", exit_stride=4).exit_stride == 1


@pytest.mark.parametrize("kind", ["rows", "all", "random", "sandwich"])
def test_members_losses_have_a_common_weight_besides_their_own(kind: str) -> None:
    config = SamplerConfig(kind=kind, weight_power=0.5, exit_stride=4)  # type: ignore[arg-type]
    for step in range(8):
        whole, faded = (
            plan_step(PLANS, config, seed=0, step=step, num_rows=16, weight=weight) for weight in (1.0, 0.25)
        )
        assert faded.full == whole.full
        assert not whole.exits or faded.exit_weight == whole.exit_weight / 4
        assert [slot.weight for slot in faded.slots] == [slot.weight / 4 for slot in whole.slots]


@pytest.mark.parametrize("kind", ["rows", "all", "random", "sandwich"])
def test_a_plan_is_a_function_of_seed_and_step(kind: str) -> None:
    assert [plan(kind, step, shared_cache=0.5) for step in range(20)] == [
        plan(kind, step, shared_cache=0.5) for step in range(20)
    ]


def test_the_shared_cache_gets_its_share_of_turns() -> None:
    """3 members x 1,000 steps; 5 sigma."""
    plans = [plan("rows", step, row_fraction=0.25, shared_cache=0.5, min_rows=1) for step in range(1000)]
    shared = sum(slot.shift is not None for made in plans for slot in made.slots)
    assert abs(shared - 1500) < 5 * (3000 * 0.25) ** 0.5
    assert all(slot.shift is None for slot in plan("rows", shared_cache=0.0).slots)


@given(num_names=st.integers(0, 5), slots=st.floats(0, 40), step=st.integers(0, 50))
def test_slots_that_are_counted_by_cycles_are_those_of_one_by_one(
    num_names: int, slots: float, step: int
) -> None:
    names = [f"member {number}" for number in range(num_names)]
    first, last = (math.floor(count * slots) for count in (step, step + 1))
    takers = []
    for number in range(first, last if names else first):
        cycle, index = divmod(number, len(names))
        takers.append(random.Random(f"turns 7 {cycle}").sample(names, len(names))[index])
    assert list(sampler._count_slots(names, slots, 7, step).items()) == list(Counter(takers).items())


@given(seed=st.integers(0, 10**6), step=st.integers(0, 10**6))
def test_mixtures_lie_between_a_member_and_the_next_larger_one(seed: int, step: int) -> None:
    config = SamplerConfig(kind="rows", row_fraction=1.0, mixed_fraction=1.0)
    family = {name: Granularity.parse(text) for name, text in TEXTS.items()}
    made = plan_step(PLANS, config, seed=seed, step=step, num_rows=16)
    assert made.slots
    for slot in made.slots:
        assert slot.mixture is not None
        assert slot.mixture.larger == {"S": "M", "M": "L", "L": "XL"}[slot.name]
        plan = slot.granularity(family, 4).resolve(SHAPE)
        larger = PLANS[slot.mixture.larger]
        assert plan not in (PLANS[slot.name], larger)
        assert plan.contains(PLANS[slot.name])
        assert larger.contains(plan)
        assert [layer == larger.layers[place] for place, layer in enumerate(plan.layers)] == [
            place in slot.mixture.places for place in range(4)
        ]


def test_a_fraction_of_the_turns_are_mixtures_and_plans_without_any_stay() -> None:
    def slots(mixed: float) -> list[sampler.Slot]:
        plans = [plan("rows", step, row_fraction=1.0, mixed_fraction=mixed) for step in range(200)]
        return [slot for made in plans for slot in made.slots]

    half = slots(0.5)
    assert 0.4 < sum(slot.mixture is not None for slot in half) / len(half) < 0.6
    assert [slot.rows for slot in half] == [slot.rows for slot in slots(0.0)]
    assert {slot.mixture for slot in slots(0.0)} == {None}


@pytest.mark.parametrize(
    ("texts", "mixed"),
    [
        ({"S": "ffn=0.5:1:1:1", "XL": "full"}, set()),
        ({"S": "ffn=0.125:0.5:0.5:0.5", "M": "ffn=0.5", "XL": "full"}, {"M"}),
        ({"S": "ffn=0.5:0.5:1:1", "XL": "full"}, {"S"}),
    ],
)
def test_a_mixture_is_no_member_of_the_family(texts: dict[str, str], mixed: set[str]) -> None:
    family = {name: Granularity.parse(text) for name, text in texts.items()}
    plans = {name: one.resolve(SHAPE) for name, one in family.items()}
    config = SamplerConfig(kind="rows", row_fraction=1.0, mixed_fraction=1.0)
    made = [plan_step(plans, config, seed=0, step=step, num_rows=16) for step in range(50)]
    slots = [slot for one in made for slot in one.slots if slot.mixture is not None]
    assert {slot.name for slot in slots} == mixed
    assert all(slot.granularity(family, 4).resolve(SHAPE) not in plans.values() for slot in slots)


def test_a_member_without_a_larger_one_of_its_layers_is_not_mixed() -> None:
    texts = {"A": "ffn=0.5,layers=1-2", "B": "ffn=0.5,layers=3", "XL": "full"}
    plans = {name: Granularity.parse(text).resolve(SHAPE) for name, text in texts.items()}
    config = SamplerConfig(kind="rows", row_fraction=1.0, mixed_fraction=1.0)
    made = [plan_step(plans, config, seed=0, step=step, num_rows=16) for step in range(8)]
    assert {slot.mixture for one in made for slot in one.slots} == {None}
