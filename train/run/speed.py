"""The dtype that trains fastest on this machine, and how fast a step could be at most."""

from models.elastic.config import ElasticConfig
from models.machine.card import known_card, machine_card, training_dtype
from train.objective.flops import count_step_flops
from train.recipe.recipe import Recipe
from train.run.start import check_taught


def training_precision(dtype: str) -> str:
    """Return the dtype to train in: `auto` follows the measured machine card."""
    return training_dtype(machine_card()) if dtype == "auto" else dtype


def full_speed(recipe: Recipe, config: ElasticConfig) -> float | None:
    """Return the tokens per second of one device that does the step's products at its measured rate.

    None if it was not measured, or while other programs were busy.
    """
    card = known_card()
    if card is None:
        return None
    device = card.cpu if recipe.trainer.accelerator == "cpu" else card.device
    if card.busy and device is card.cpu:
        return None
    rate = device.dtypes[training_precision(recipe.dtype)].product_gflops * 1e9
    tokens = recipe.trainer.rows_per_step * recipe.data.sequence_length
    return rate * tokens / count_step_flops(recipe, config, check_taught(recipe))
