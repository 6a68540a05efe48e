"""`nestling train --dry-run`: computes what a recipe would make and cost; nothing is made.

Only the small files of a teacher's folder are read. Time is 3 forward passes' operations for each trained
pass, counted over the sampler's own plans, at a fraction of the rate that the machine card measured for a
matrix product; memory is models/elastic/count.py's.
"""

import contextlib
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from models.base.errors import UsageError
from models.base.numbers import duration, percent, si, size
from models.base.table import Table, facts_table
from models.elastic.config import ElasticConfig
from models.elastic.count import (
    TrainingBytes,
    count_flops,
    count_kv_bytes,
    count_parameters,
    count_step_traffic,
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
from train.objective.chunked_loss import rows_per_chunk
from train.objective.flops import (
    count_flops_alone,
    count_measuring_flops,
    count_step_flops,
    count_teacher_flops,
    first_plans,
)
from train.objective.sampler import StepPlan
from train.objective.teacher import TeacherShape
from train.recipe.dials import MEMBERS
from train.recipe.recipe import Recipe, with_members
from train.recipe.settings import as_table, show
from train.run.start import check_start, check_taught

# Training spends time on norms, softmax, the optimizer and small products as well: the fraction of a
# large product's rate that configs/demo.yaml was seen to reach on one core.
UTILISATION = {"fp32": 0.6, "bf16": 0.3}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The resources that a run takes."""

    tokens_per_step: int
    tokens: int
    flops_per_step: float
    """Mean over the sampler's plans, all devices together."""
    members_factor: float
    """Operations of a step without a teacher's, over those of the full model alone."""
    memory: TrainingBytes
    """Memory of one device."""
    devices: int
    sent: int
    """Bytes that each device sends in a step."""
    seconds: float
    """Time of the steps."""
    measuring_seconds: float
    """Time, at most, to measure the family on held-out text."""
    dtype: str
    gflops: float
    """The measured rate of a matrix product."""
    owned: int = 0
    """Weights of members alone, where nothing else trains."""
    teacher_parameters: int = 0
    teacher_flops: float = 0.0
    """The teacher's part of a step's operations, once the ramp has begun."""
    teacher_bytes: int = 0
    """The teacher's weights on each device, beside `memory`."""
    teacher_note: str = ""


def dry_run(recipe: Recipe, console: Console) -> Estimate:
    """Print the resolved recipe, which is long, then the family and what the run would take.

    Raises:
        UsageError: if the model's sizes do not fit together, or its teacher not to the recipe.
    """
    start, teacher = check_start(recipe), check_taught(recipe)
    config = start or recipe.elastic_config(teacher.vocab_size if teacher else None)
    with console.status("measuring this machine"):
        card = _card()
    estimate = estimate_run(recipe, config, card, teacher)
    console.print(_yaml(recipe), markup=False, soft_wrap=True)
    console.print(family_costs(recipe, config).to_rich(title="the family"))
    console.print(estimate_table(estimate, recipe, config).to_rich())
    return estimate


def estimate_run(
    recipe: Recipe, config: ElasticConfig, card: MachineCard, teacher: TeacherShape | None = None
) -> Estimate:
    """Return tokens, memory and time of a run.

    Args:
        recipe: The run.
        config: the full model's shape.
        card: this machine.
        teacher: the shape of the model that the full one learns from, if any.
    """
    devices, trainer = num_devices(recipe), recipe.trainer
    tokens_per_step = trainer.rows_per_step * recipe.data.sequence_length
    dtype = resolve_dtype(recipe.dtype, card, purpose="training")
    gflops = card.device.dtypes[dtype].product_gflops
    rate = gflops * 1e9 * UTILISATION[dtype]
    plans = first_plans(recipe, config)
    flops = count_step_flops(recipe, config, teacher)
    owned = count_owned(recipe, config)
    number_bytes = 2 if dtype == "bf16" else 4
    memory = estimate_training_bytes(
        config,
        batch_tokens=-(-trainer.batch_size // devices) * recipe.data.sequence_length,
        activation_bytes=number_bytes,
        members=_largest_fractions(plans, recipe),
        scored_at_once=rows_per_chunk(config.vocab_size, torch.device("cuda" if card.gpu else "cpu")),
        shards=devices if trainer.strategy == "fsdp" else 1,
        compiled=card.gpu is None and library("train_ops") is not None,
        owned=owned,
    )
    if recipe.model.train == "owned":  # what stays has neither gradients nor moments
        own = 4 * owned
        memory = replace(memory, gradients=own, optimizer=2 * own)
    busiest = max(plans, key=lambda plan: len(plan.slots))
    traffic = count_step_traffic(
        config,
        sharded=trainer.strategy == "fsdp",
        passes=[FULL, *(recipe.granularities[slot.name] for slot in busiest.slots)],
        micro_batches=trainer.accumulate_grad_batches,
        owned=owned,
    )
    return Estimate(
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * trainer.max_steps,
        flops_per_step=flops,
        members_factor=count_step_flops(recipe, config) / count_flops_alone(recipe, config),
        memory=memory,
        devices=devices,
        sent=traffic.sent(devices),
        seconds=flops * trainer.max_steps / (rate * devices),
        measuring_seconds=count_measuring_flops(recipe, config) / rate,  # one device does it
        dtype=dtype,
        gflops=gflops,
        owned=owned if recipe.model.train == "owned" else 0,
        teacher_parameters=teacher.parameters if teacher else 0,
        teacher_flops=count_teacher_flops(recipe, config, teacher),
        teacher_bytes=teacher.weight_bytes(number_bytes) if teacher else 0,
        teacher_note=teacher.note if teacher else "",
    )


def count_owned(recipe: Recipe, config: ElasticConfig) -> int:
    """Return how many weights the members of a run have for themselves."""
    ownership = recipe.owned.ownership
    return sum(ownership.count(config, one) for one in recipe.granularities.values())


def _largest_fractions(plans: list[StepPlan], recipe: Recipe) -> list[tuple[Granularity, float]]:
    """Return each student with the largest fraction of a micro-batch that it trains on."""
    members, batch_size = recipe.granularities, recipe.trainer.batch_size
    fractions: dict[str, float] = {}
    for plan in plans:
        fractions |= dict.fromkeys(plan.exits, 1 / plan.exit_stride)
        for slot in plan.slots:
            fraction = min(len(slot.rows), batch_size) / batch_size
            fractions[slot.name] = max(fractions.get(slot.name, 0.0), fraction)
    return [(members[name], fraction) for name, fraction in fractions.items()]


def num_devices(recipe: Recipe) -> int:
    """Return the number of processes of a run, as far as it is known before."""
    devices = str(recipe.trainer.devices)
    per_node = len(devices.split(",")) if "," in devices else int(devices) if devices.isdigit() else 0
    if per_node == 0:  # auto, or -1: all there are
        per_node = 1 if recipe.trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return per_node * recipe.trainer.num_nodes


def family_costs(recipe: Recipe, config: ElasticConfig) -> Table:
    """Return parameters, those of its own, FLOPs and KV bytes of each member."""
    header = (
        "member",
        "granularity",
        "parameters",
        "of the full",
        "its own",
        "FLOPs/token",
        "KV bytes/token",
    )
    rows, ownership = [], recipe.owned.ownership
    full = count_parameters(config)
    for name, granularity in recipe.granularities.items():
        parameters = count_parameters(config, granularity)
        costs = (
            f"{parameters:,}",
            percent(parameters / full),
            f"{ownership.count(config, granularity):,}",
            si(count_flops(config, granularity)),
            f"{count_kv_bytes(config, granularity, num_positions=1, dtype_bytes=4):,}",
        )
        rows.append((name, str(granularity), *costs))
    return Table(header, tuple(rows), num_labels=2)


def estimate_table(estimate: Estimate, recipe: Recipe, config: ElasticConfig) -> Table:
    """Return the estimate in words."""
    memory, tokenizer, taught = estimate.memory, recipe.data.tokenizer, recipe.loss.teacher is not None
    held = recipe.is_held
    state = memory.weights + memory.gradients + memory.optimizer
    owner = "that model" if recipe.model.from_ else "the teacher" if taught else ""
    decides = "" if tokenizer == "bpe" else f" (that of {tokenizer} decides in the run)"
    facts = {
        "vocabulary": f"{config.vocab_size:,}{f' ({owner} has it)' if owner else decides}",
        "tokens per step": f"{estimate.tokens_per_step:,}",
        "tokens in total": f"{estimate.tokens:,} in {recipe.trainer.max_steps:,} steps",
        "FLOPs per step": f"{si(estimate.flops_per_step)}, forward and backward; with its members "
        f"{estimate.members_factor:.2f} x those of the full model alone",
    }
    if taught or held:
        facts["teacher" if taught else "frozen original"] = _describe_teacher(estimate, recipe)
    facts["members="] = f"{_presets(recipe, config)} those of the full model alone; in time a little more"
    facts["memory"] = (
        f"about {size(memory.total)}: {size(state)} weights, gradients and optimizer, "
        f"{size(memory.activations)} activations, {size(memory.logits)} logits"
    )
    if estimate.owned:
        facts["owned"] = f"{estimate.owned:,} parameters; the full model's stay as they are"
    if estimate.devices > 1:
        sent = size(estimate.sent)
        facts["devices"] = f"each of {estimate.devices} devices holds this and sends {sent} a step"
    if short := too_short(recipe):
        facts["too short"] = "\n".join(short)
    facts["time"] = (
        f"about {duration(estimate.seconds)} in {estimate.dtype}, at {percent(UTILISATION[estimate.dtype])} "
        f"of the {estimate.gflops:,.0f} GFLOP/s that this machine was measured to do, and up to "
        f"{duration(estimate.measuring_seconds)} to measure the family on held-out text"
    )
    return facts_table(tuple(facts.items()))


def too_short(recipe: Recipe) -> list[str]:
    """Return what a run is too short for, a line each.

    >>> from train.recipe.recipe import load_recipe
    >>> for line in too_short(load_recipe(overrides=["trainer.max_steps=80", "loss.teacher=big"])):
    ...     print(line)
    optim.warmup_steps=100: the run of 80 steps ends at 80% of optim.lr=0.001; set it lower
    loss.ramp_start=200: the run of 80 steps ends before its teacher is heard; set it lower
    >>> too_short(load_recipe())
    []
    """
    steps, warmup, start = recipe.trainer.max_steps, recipe.optim.warmup_steps, recipe.loss.ramp_start
    found = []
    if warmup > steps:
        reached = f"{percent(steps / warmup)} of optim.lr={show(recipe.optim.lr)}"
        found.append(f"optim.warmup_steps={warmup}: the run of {steps} steps ends at {reached}; set it lower")
    if start >= steps and recipe.loss.teacher is not None:
        lost = f"the run of {steps} steps ends before its teacher is heard"
        found.append(f"loss.ramp_start={start}: {lost}; set it lower")
    return found


def _describe_teacher(estimate: Estimate, recipe: Recipe) -> str:
    if recipe.distill.cache is not None:
        kept = "every logit" if recipe.distill.form == "all" else f"{recipe.distill.k} tokens a position"
        return f"{kept} ({recipe.distill.form}), read from {recipe.distill.cache}"
    if not estimate.teacher_parameters:
        return f"served; it {estimate.teacher_note}"
    fraction = percent(estimate.teacher_flops / estimate.flops_per_step)
    told = (
        f"{estimate.teacher_parameters:,} parameters, {fraction} of these FLOPs once it teaches, "
        f"{size(estimate.teacher_bytes)} of weights beside the memory below"
    )
    return f"{told}; it {estimate.teacher_note}" if estimate.teacher_note else told


def _presets(recipe: Recipe, config: ElasticConfig) -> str:
    """Return what a step would cost with each value of the dial that fits the recipe."""
    found = []
    for name in MEMBERS:
        with contextlib.suppress(UsageError):
            other = with_members(recipe, name)
            factor = count_step_flops(other, config) / count_flops_alone(other, config)
            found.append(f"{name} {factor:.2f} x")
    return ", ".join(found)


def _card() -> MachineCard:
    """Return the machine's card; one that is not cached yet is measured and not kept."""
    return machine_card() if known_card() else measure_card(this_machine())


def _yaml(recipe: Recipe) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(as_table(recipe)))
