"""The Lightning module, without a trainer."""

import dataclasses
import gc
from types import SimpleNamespace
from typing import cast

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.sections import LossConfig, SamplerConfig
from train.run.module import JointModule

MEMBERS = {"S": Granularity(ffn=(0.5,)), "D": Granularity(layers=(0, 1)), "XL": Granularity()}


def losses(model: ElasticLM, recipe: Recipe, step: int) -> dict[str, Tensor]:
    """What a step's members add to its loss."""
    module = JointModule(model, MEMBERS, recipe)
    module.trainer = cast(pl.Trainer, SimpleNamespace(world_size=1))
    tokens_BT = torch.arange(4 * 8).reshape(4, 8) % 64
    batch = Batch(tokens_BT, tokens_BT.roll(-1), step=step, first_row=0, num_rows=4, num_valid=32)
    module.training_step(batch, 0)
    return module.losses


@pytest.mark.parametrize(("step", "left"), [(0, 1.0), (50, 1.0), (75, 0.6), (90, 0.36)])
def test_members_losses_lose_weight_towards_the_end_of_a_run(
    step: int, left: float, tiny_model: ElasticLM
) -> None:
    recipe = dataclasses.replace(
        load_recipe(overrides=["trainer.max_steps=100"]),
        sampler=SamplerConfig(kind="all"),
        loss=LossConfig(fade_from=0.5, fade_to=0.2),
    )
    lasting = dataclasses.replace(recipe, loss=LossConfig(fade_to=1.0))
    ours, theirs = (losses(tiny_model, one, step) for one in (recipe, lasting))
    assert ours["XL"] == theirs["XL"]
    for name in ("S", "D"):
        torch.testing.assert_close(ours[name], left * theirs[name])


def test_what_is_here_when_training_starts_is_set_aside_until_it_ends(tiny_model: ElasticLM) -> None:
    """Or the collector would walk over all of it during steps."""
    module = JointModule(tiny_model, MEMBERS, load_recipe())
    gc.unfreeze()
    try:
        module.on_train_start()
        assert gc.get_freeze_count() > 1000
    finally:
        module.on_train_end()
    assert gc.get_freeze_count() == 0
