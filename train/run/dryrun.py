"""`nestling train --dry-run`: what a recipe would make and cost, by arithmetic; nothing is made.

Of a teacher the folder's small files are read. Time is 3 forward passes' operations for each trained pass,
counted over the sampler's own plans, at a share of the rate that the machine card measured for a matrix
product; memory is models/elastic/count.py's.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from models.elastic.config import ElasticConfig
from models.elastic.count import (
    TrainingBytes,
    count_flops,
    count_kv_bytes,
    count_parameters,
    count_step_traffic,
    count_weight_bytes,
    estimate_training_bytes,
)
from models.elastic.granularity import FULL, Granularity
from models.kernels.build import library
from models.machine.card import (
    MachineCard,
    known_card,
    machine_card,
    measure_card,
    resolve_dtype,
    this_machine,
)
from train.objective.chunked_loss import rows_of_a_piece
from train.objective.flops import count_step_flops, count_teacher_flops, first_plans
from train.objective.sampler import StepPlan
from train.recipe.recipe import Recipe
from train.run.teacher import check_teacher

# Training spends time on norms, softmax, the optimizer and small products as well: the share of a
# large product's rate that configs/demo.yaml was seen to reach on one core.
UTILISATION = {"fp32": 0.6, "bf16": 0.3}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes."""

    tokens_per_step: int
    tokens: int
    flops_per_step: float
    """Mean over the sampler's plans, all devices together."""
    memory: TrainingBytes
    """On one device."""
    devices: int
    sent: int
    """Bytes that each device sends in a step."""
    seconds: float
    dtype: str
    gflops: float
    """The measured rate of a matrix product."""
    teacher_parameters: int = 0
    teacher_flops: float = 0.0
    """Of a step's, once the ramp has begun."""
    teacher_bytes: int = 0
    """On each device, beside `memory`."""


def dry_run(recipe: Recipe, console: Console) -> Estimate:
    """Print the resolved recipe, the family and what the run would take.

    Raises:
        UsageError: if the model's sizes do not fit together, or its teacher not to the recipe.
    """
    teacher = check_teacher(recipe)
    config = recipe.elastic_config(teacher.vocab_size if teacher else None)
    with console.status("measuring this machine"):
        card = _card()
    estimate = estimate_run(recipe, config, card, teacher)
    console.print(_yaml(recipe), markup=False, soft_wrap=True)
    console.print(family_costs(recipe.granularities, config))
    console.print(estimate_table(estimate, recipe, config.vocab_size))
    return estimate


def estimate_run(
    recipe: Recipe, config: ElasticConfig, card: MachineCard, teacher: ElasticConfig | None = None
) -> Estimate:
    """Tokens, memory and time of a run.

    Args:
        recipe: the run.
        config: the full model's shape.
        card: this machine.
        teacher: the shape of the model that the full one learns from, if any.
    """
    devices, trainer = num_devices(recipe), recipe.trainer
    tokens_per_step = trainer.rows_per_step * recipe.data.sequence_length
    dtype = resolve_dtype(recipe.dtype, card, purpose="training")
    gflops = card.device.dtypes[dtype].product_gflops
    plans = first_plans(recipe, config)
    flops = count_step_flops(recipe, config, teacher)
    number_bytes = 2 if dtype == "bf16" else 4
    memory = estimate_training_bytes(
        config,
        batch_tokens=-(-trainer.batch_size // devices) * recipe.data.sequence_length,
        activation_bytes=number_bytes,
        members=_largest_shares(plans, recipe),
        scored_at_once=rows_of_a_piece(config.vocab_size, torch.device("cuda" if card.gpu else "cpu")),
        shards=devices if trainer.strategy == "fsdp" else 1,
        compiled=card.gpu is None and library("train_ops") is not None,
    )
    busiest = max(plans, key=lambda plan: len(plan.slots))
    traffic = count_step_traffic(
        config,
        shared_out=trainer.strategy == "fsdp",
        passes=[FULL, *(recipe.granularities[slot.name] for slot in busiest.slots)],
        micro_batches=trainer.accumulate_grad_batches,
    )
    return Estimate(
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * trainer.max_steps,
        flops_per_step=flops,
        memory=memory,
        devices=devices,
        sent=traffic.sent(devices),
        seconds=flops * trainer.max_steps / (gflops * 1e9 * UTILISATION[dtype] * devices),
        dtype=dtype,
        gflops=gflops,
        teacher_parameters=count_parameters(teacher) if teacher else 0,
        teacher_flops=count_teacher_flops(recipe, config, teacher),
        teacher_bytes=count_weight_bytes(teacher, dtype_bytes=number_bytes) if teacher else 0,
    )


def _largest_shares(plans: list[StepPlan], recipe: Recipe) -> list[tuple[Granularity, float]]:
    """Members that train, each with the most of a micro-batch's rows that it may train on."""
    members, batch_size = recipe.granularities, recipe.trainer.batch_size
    shares: dict[str, float] = {}
    for plan in plans:
        shares |= dict.fromkeys(plan.exits, 1 / plan.exit_stride)
        for slot in plan.slots:
            share = min(len(slot.rows), batch_size) / batch_size
            shares[slot.name] = max(shares.get(slot.name, 0.0), share)
    return [(members[name], share) for name, share in shares.items()]


def num_devices(recipe: Recipe) -> int:
    """Processes that share a step, as far as it can be told before the run."""
    devices = str(recipe.trainer.devices)
    per_node = len(devices.split(",")) if "," in devices else int(devices) if devices.isdigit() else 0
    if per_node == 0:  # auto, or -1: all there are
        per_node = 1 if recipe.trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return per_node * recipe.trainer.num_nodes


def family_costs(members: Mapping[str, Granularity], config: ElasticConfig) -> Table:
    """Parameters, FLOPs and KV bytes of each member."""
    table = Table(title="the family", title_justify="left")
    for column in ("member", "granularity"):
        table.add_column(column)
    for column in ("parameters", "of the full", "FLOPs/token", "KV bytes/token"):
        table.add_column(column, justify="right", no_wrap=True)
    full = count_parameters(config)
    for name, granularity in members.items():
        parameters = count_parameters(config, granularity)
        table.add_row(
            name,
            str(granularity),
            f"{parameters:,}",
            f"{parameters / full:.0%}",
            _si(count_flops(config, granularity)),
            f"{count_kv_bytes(config, granularity, num_positions=1, dtype_bytes=4):,}",
        )
    return table


def estimate_table(estimate: Estimate, recipe: Recipe, vocab_size: int) -> Table:
    """The estimate in words."""
    table = Table(show_header=False, box=None)
    steps = recipe.trainer.max_steps
    memory = estimate.memory
    state = memory.weights + memory.gradients + memory.optimizer
    tokenizer, is_taught = recipe.data.tokenizer, estimate.teacher_parameters > 0
    vocabulary = "" if tokenizer == "bpe" else f" (that of {tokenizer} decides in the run)"
    table.add_row("vocabulary", f"{vocab_size:,}{' (the teacher has it)' if is_taught else vocabulary}")
    table.add_row("tokens per step", f"{estimate.tokens_per_step:,}")
    table.add_row("tokens in total", f"{estimate.tokens:,} in {steps:,} steps")
    flops = _si(estimate.flops_per_step)
    table.add_row("FLOPs per step", f"{flops}, forward and backward, members included")
    if is_taught:
        share = estimate.teacher_flops / estimate.flops_per_step
        text = f"{estimate.teacher_parameters:,} parameters, {share:.0%} of these FLOPs once it teaches"
        table.add_row("teacher", f"{text}, {_gib(estimate.teacher_bytes)} of weights beside the memory below")
    table.add_row(
        "memory",
        f"about {_gib(memory.total)}: {_gib(state)} weights, gradients and optimizer, "
        f"{_gib(memory.activations)} activations, {_gib(memory.logits)} logits",
    )
    if estimate.devices > 1:
        text = f"each of {estimate.devices} devices holds this and sends {_gib(estimate.sent)} a step"
        table.add_row("devices", text)
    share = UTILISATION[estimate.dtype]
    table.add_row(
        "time",
        f"about {_duration(estimate.seconds)} in {estimate.dtype}, at {share:.0%} of the "
        f"{estimate.gflops:,.0f} GFLOP/s that this machine was measured to do",
    )
    return table


def _card() -> MachineCard:
    """The machine's card; one that is not cached yet is measured and not kept."""
    return machine_card() if known_card() else measure_card(this_machine())


def _yaml(recipe: Recipe) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(recipe)))


def _si(value: float) -> str:
    """A number with its prefix.

    >>> _si(2_345_000), _si(12)
    ('2.35M', '12')
    """
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    """A duration in its two largest units.

    >>> _duration(42), _duration(3720), _duration(200000)
    ('42 s', '1 h 02 min', '2 d 08 h')
    """
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes:.0f} min"
    if days < 1:
        return f"{int(hours)} h {int(minutes) % 60:02d} min"
    return f"{int(days)} d {round(hours) % 24:02d} h"
