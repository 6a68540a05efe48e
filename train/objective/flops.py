"""Operations of an optimizer step, counted over the sampler's own plans."""

import statistics

from models.elastic.config import ElasticConfig
from models.elastic.count import count_flops
from models.elastic.granularity import Granularity
from train.objective.sampler import StepPlan, plan_step, resolve_turns
from train.objective.teacher import TeacherShape
from train.recipe.recipe import FULL_NAME, Recipe

# A random sampler's plans differ from step to step.
NUM_PLANS = 64


def first_plans(recipe: Recipe, config: ElasticConfig) -> list[StepPlan]:
    """Return the sampler's plans of the first steps."""
    members = {name: one.resolve(config) for name, one in recipe.granularities.items()}
    num_rows = recipe.trainer.rows_per_step
    sampler = resolve_turns(recipe.sampler, recipe.granularities, config)
    return [
        plan_step(
            members,
            sampler,
            seed=recipe.seed,
            step=step,
            num_rows=num_rows,
            full=recipe.full_weight(step),
        )
        for step in range(NUM_PLANS)
    ]


def count_step_flops(recipe: Recipe, config: ElasticConfig, teacher: TeacherShape | None = None) -> float:
    """Return the operations of a step, all included, forward and backward: the mean over the plans."""
    own = statistics.fmean(_plan_flops(plan, recipe, config) for plan in first_plans(recipe, config))
    return own + count_teacher_flops(recipe, config, teacher)


def count_flops_alone(recipe: Recipe, config: ElasticConfig) -> float:
    """Return the operations of a step of the full model without members and teacher."""
    forward = count_flops(config, num_tokens=recipe.data.sequence_length)
    return 3.0 * recipe.trainer.rows_per_step * forward


def count_teacher_flops(recipe: Recipe, config: ElasticConfig, teacher: TeacherShape | None) -> float:
    """Return the operations of a frozen teacher in a step: a forward pass where the full model trains.

    There are none where a cache keeps what it says.
    """
    if teacher is None or recipe.distill.cache is not None:
        return 0.0
    taught = statistics.fmean(plan.full > 0 for plan in first_plans(recipe, config))
    return taught * recipe.trainer.rows_per_step * teacher.flops(recipe.data.sequence_length)


def count_measuring_flops(recipe: Recipe, config: ElasticConfig) -> float:
    """Return the operations of measuring the family on held-out text, in all of a run, at most.

    Each time every member reads it, and a batch is trained on by each to compare their gradients.
    """
    trainer, length = recipe.trainer, recipe.data.sequence_length
    forward = sum(count_flops(config, one, num_tokens=length) for one in recipe.granularities.values())
    times = trainer.max_steps // trainer.val_check_interval
    passes = times * (trainer.limit_val_batches + 3) + trainer.limit_final_batches
    return float(passes * trainer.batch_size * forward)


def _plan_flops(plan: StepPlan, recipe: Recipe, config: ElasticConfig) -> int:
    """Return a plan's operations: a pass that is trained costs three, one that only teaches costs one."""
    members, length = recipe.granularities, recipe.data.sequence_length
    num_rows = recipe.trainer.rows_per_step

    def forward(granularity: Granularity, num_scored: int | None = None) -> int:
        return count_flops(config, granularity, num_tokens=length, num_scored=num_scored)

    # An exit costs the vocabulary head; the pass under it is the full model's own.
    head = 2 * config.hidden_size * config.vocab_size * length
    full = num_rows * forward(members[FULL_NAME]) * (3 if plan.full else 1)
    if plan.exits and not plan.full and recipe.model.train == "joint":  # which train the layers below them
        full += 2 * num_rows * max(forward(members[name], num_scored=0) for name in plan.exits)
    exits = 3 * num_rows * head * len(plan.exits) // plan.exit_stride
    num_layers = config.num_hidden_layers
    own = sum(3 * len(slot.rows) * forward(slot.granularity(members, num_layers)) for slot in plan.slots)
    return full + exits + own
