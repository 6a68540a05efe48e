"""What a run is said to cost, against counts made by hand."""

import dataclasses

import pytest

from models.elastic.count import count_flops, count_parameters
from models.elastic.granularity import Granularity
from models.machine.card import MachineCard, measure_card, this_machine
from train.objective.teacher import TeacherShape
from train.recipe.recipe import Recipe, load_recipe
from train.run.dryrun import UTILISATION, Estimate, estimate_run, num_devices

ROWS, LENGTH = 8, 64


@pytest.fixture(scope="module")
def card() -> MachineCard:
    return measure_card(this_machine(), num_matrices=1, budget=0.0)


def recipe(*overrides: str) -> Recipe:
    small = [f"trainer.batch_size={ROWS}", f"data.sequence_length={LENGTH}", "trainer.max_steps=10"]
    small += ["trainer.devices=1", "dtype=fp32", "model.num_hidden_layers=4", "family={S: ffn=0.25}"]
    small += ["sampler.mixed_fraction=0"]
    return load_recipe(overrides=[*small, *overrides])


def step_flops(card: MachineCard, *overrides: str) -> float:
    one = recipe(*overrides)
    return estimate_run(one, one.elastic_config(), card).flops_per_step


def forward(granularity: str) -> int:
    config = recipe().elastic_config()
    return ROWS * count_flops(config, Granularity.parse(granularity), num_tokens=LENGTH)


def test_every_member_on_every_row_costs_three_passes_each(card: MachineCard) -> None:
    cost = step_flops(card, "sampler.kind=all")
    assert cost == 3 * (forward("full") + forward("ffn=0.25"))


def test_a_member_on_a_share_of_the_rows_costs_that_share(card: MachineCard) -> None:
    cost = step_flops(card, "sampler.kind=rows", "sampler.row_fraction=0.25")
    assert cost == 3 * (forward("full") + forward("ffn=0.25") / 4)


def test_a_mixture_costs_what_lies_between_its_member_and_the_larger_one(card: MachineCard) -> None:
    cost = step_flops(card, "sampler.row_fraction=1", "sampler.mixed_fraction=1")
    small, full = forward("ffn=0.25"), forward("full")
    assert small < cost / 3 - full < full
    halfway = (small + full) / 2
    assert cost / 3 - full == pytest.approx(halfway, rel=0.1), "on average half of the layers are wide"


def test_a_prefix_of_the_layers_costs_a_head(card: MachineCard) -> None:
    one = recipe()
    head = 2 * one.model.hidden_size * one.data.vocab_size * ROWS * LENGTH
    everywhere = step_flops(card, "family={D: layers=0-1}", "sampler.exit_stride=1")
    assert everywhere == 3 * (forward("full") + head)
    at_some = step_flops(card, "family={D: layers=0-1}", "sampler.exit_stride=4")
    assert at_some == 3 * forward("full") + 3 * head // 4


def test_one_member_a_step_costs_its_passes_and_the_teacher(card: MachineCard) -> None:
    always = ["sampler.kind=random", "sampler.probabilities={S: 1, XL: 0}"]
    assert step_flops(card, *always) == forward("full") + 3 * forward("ffn=0.25")


def test_a_teacher_costs_a_pass_of_its_own_where_the_full_model_learns(card: MachineCard) -> None:
    one, always = recipe(), recipe("sampler.kind=random", "sampler.probabilities={S: 1, XL: 0}")
    config = one.elastic_config()
    teacher = dataclasses.replace(config, num_hidden_layers=7)
    alone, taught = estimate_run(one, config, card), estimate_run(one, config, card, TeacherShape.of(teacher))
    assert taught.teacher_flops == ROWS * count_flops(teacher, num_tokens=LENGTH)
    assert taught.flops_per_step == alone.flops_per_step + taught.teacher_flops
    assert taught.seconds > alone.seconds
    assert taught.teacher_bytes == 4 * taught.teacher_parameters == 4 * count_parameters(teacher)
    assert estimate_run(always, config, card, TeacherShape.of(teacher)).teacher_flops == 0


def test_accumulation_takes_time_and_no_memory(card: MachineCard) -> None:
    once = recipe("sampler.row_fraction=0.25")
    twice = recipe("sampler.row_fraction=0.25", "trainer.accumulate_grad_batches=2")
    config = once.elastic_config()
    ours, theirs = estimate_run(once, config, card), estimate_run(twice, config, card)
    assert ours.tokens == 10 * ROWS * LENGTH
    assert theirs.tokens == 2 * ours.tokens
    assert theirs.seconds == pytest.approx(2 * ours.seconds)
    assert theirs.memory == ours.memory


def test_measuring_reads_each_batch_with_every_member_and_compares_gradients_on_one(
    card: MachineCard,
) -> None:
    words = ["trainer.val_check_interval=4", "trainer.limit_val_batches=5"]  # twice in 10 steps
    one = recipe(*words)
    members = sum(forward(str(granularity)) for granularity in one.granularities.values())
    rate = card.device.dtypes["fp32"].product_gflops * 1e9 * UTILISATION["fp32"]
    estimate = estimate_run(one, one.elastic_config(), card)
    assert estimate.measuring_seconds == pytest.approx((2 * (5 + 3) + 4 * 5) * members / rate)


def test_time_follows_the_measured_rate(card: MachineCard) -> None:
    one = recipe()
    estimate = estimate_run(one, one.elastic_config(), card)
    rate = card.device.dtypes["fp32"].product_gflops * 1e9 * UTILISATION["fp32"]
    assert estimate.seconds == pytest.approx(10 * estimate.flops_per_step / rate)


@pytest.mark.parametrize(("devices", "count"), [("1", 1), ("3", 3), ("[0,2]", 2), ("0,1,2", 3), ("auto", 1)])
def test_devices_are_counted(devices: str, count: int) -> None:
    one = recipe()
    trainer = dataclasses.replace(one.trainer, devices=devices, accelerator="cpu", num_nodes=2)
    assert num_devices(dataclasses.replace(one, trainer=trainer)) == 2 * count


def test_devices_share_rows_and_time_and_with_fsdp_the_weights(card: MachineCard) -> None:
    def estimate(*overrides: str) -> Estimate:
        one = recipe("trainer.accelerator=cpu", *overrides)
        return estimate_run(one, one.elastic_config(), card)

    alone, ddp = estimate(), estimate("trainer.devices=4")
    fsdp = estimate("trainer.devices=4", "trainer.strategy=fsdp")
    assert ddp.tokens_per_step == alone.tokens_per_step == ROWS * LENGTH
    assert ddp.seconds == pytest.approx(alone.seconds / 4)
    assert ddp.memory.activations == alone.memory.activations // 4
    assert ddp.memory.optimizer == alone.memory.optimizer == 4 * fsdp.memory.optimizer
    assert alone.sent == 0
    assert ddp.sent == 2 * alone.memory.gradients * 3 // 4


def test_the_cost_of_members_is_told_as_a_multiple_of_the_full_models(card: MachineCard) -> None:
    one = recipe("sampler.row_fraction=0.25")
    expected = 1 + forward("ffn=0.25") / forward("full") / 4
    assert estimate_run(one, one.elastic_config(), card).members_factor == pytest.approx(expected)


def test_what_members_own_is_counted(card: MachineCard) -> None:
    one, owning = recipe("owned.norms=false", "owned.rank=0"), recipe("owned.norms=true", "owned.rank=4")
    config = one.elastic_config()
    own = owning.owned.ownership.count(config, Granularity.parse("ffn=0.25"))
    less, more = (estimate_run(each, config, card).memory for each in (one, owning))
    assert (more.weights - less.weights, more.gradients - less.gradients) == (4 * own, 4 * own)
    assert more.optimizer - less.optimizer == 8 * own
