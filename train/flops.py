"""Operations of an optimizer step, counted over the sampler's own plans."""

import statistics

from models.config import ElasticConfig
from models.count import count_flops
from train.recipe import FULL_NAME, Recipe
from train.sampler import StepPlan, plan_step

# A random sampler's plans differ from step to step.
NUM_PLANS = 64


def first_plans(recipe: Recipe, config: ElasticConfig) -> list[StepPlan]:
    """What the sampler does in the first steps."""
    members = {name: one.resolve(config) for name, one in recipe.granularities.items()}
    num_rows = recipe.trainer.rows_per_step
    return [
        plan_step(members, recipe.sampler, seed=recipe.seed, step=step, num_rows=num_rows)
        for step in range(NUM_PLANS)
    ]


def count_step_flops(recipe: Recipe, config: ElasticConfig) -> float:
    """Operations of a step, forward and backward, members included: the mean over the sampler's plans."""
    return statistics.fmean(_plan_flops(plan, recipe, config) for plan in first_plans(recipe, config))


def _plan_flops(plan: StepPlan, recipe: Recipe, config: ElasticConfig) -> int:
    """A pass that is trained costs three, one that only teaches a single one."""
    members, length = recipe.granularities, recipe.data.sequence_length
    num_rows = recipe.trainer.rows_per_step

    def forward(name: str) -> int:
        return count_flops(config, members[name], num_tokens=length)

    # An exit costs the vocabulary head; the pass under it is the full model's own.
    head = 2 * config.hidden_size * config.vocab_size * length
    full = num_rows * forward(FULL_NAME) * (3 if plan.full else 1)
    exits = 3 * num_rows * head * len(plan.exits) // plan.exit_every
    return full + exits + sum(3 * len(turn.rows) * forward(turn.name) for turn in plan.turns)
