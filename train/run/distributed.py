"""The processes of a run: one for each device. They run the same program; the first one alone writes.

Lightning starts the others of a machine itself, or finds those that torchrun or SLURM has started
(docs/scaling.md). What they must agree on is decided by the first and broadcast.
"""

import contextlib
from collections.abc import Iterator

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from models.base.errors import NestlingError, UsageError
from train.recipe.recipe import Recipe
from train.recipe.sections import TrainerConfig


def make_fabric(settings: TrainerConfig) -> Fabric:
    """Return a Fabric, which knows which of how many processes this is; start none.

    Raises:
        UsageError: if the rows of a micro-batch cannot be divided evenly.
    """
    fabric = Fabric(accelerator=settings.accelerator, devices=settings.devices, num_nodes=settings.num_nodes)
    if settings.batch_size % fabric.world_size:
        raise UsageError(
            f"trainer.batch_size={settings.batch_size}: {fabric.world_size} processes cannot divide its rows "
            f"evenly; give a multiple of {fabric.world_size}, or other trainer.devices"
        )
    return fabric


@contextlib.contextmanager
def side_by_side(fabric: Fabric) -> Iterator[None]:
    """Start the processes that are missing and meet all; only the first goes on after the block.

    Raises:
        SystemExit: 0, in the others, at the end. Lightning and torchrun take any other code for a crash and
            kill the first, which has yet to write.
    """
    try:
        fabric.launch()
        yield
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        launcher = fabric.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            for process in launcher.procs:  # they wait for this one and would do so for long
                process.kill()
        raise
    if not fabric.is_global_zero:
        raise SystemExit(0)


def check_agreed(fabric: Fabric, what: str, value: str) -> None:
    """Refuse a run whose processes would not do the same.

    Raises:
        NestlingError: in a process whose value differs from the first one's.
    """
    first = fabric.broadcast(value)
    if value != first:
        raise NestlingError(f"{what} is {value} in process {fabric.global_rank}, {first} in the first one")


def make_strategy(recipe: Recipe, world_size: int) -> str | Strategy:
    """Return Lightning's strategy for a recipe: DDP unless the recipe shards the weights."""
    if recipe.trainer.strategy == "fsdp":
        return FullyShard()
    if recipe.trainer.strategy == "auto" and world_size == 1:
        return "auto"
    # With the random sampler, or where the full model only teaches in some steps, no loss but narrow members'
    # is trained, and the layers that they skip have no gradient; else the full model's pass reaches every
    # shared weight in every process. What a member owns has a gradient only in the steps in which it trains.
    narrow_alone = recipe.sampler.kind == "random" or recipe.loss.trust_every > 1
    return DDPStrategy(
        find_unused_parameters=narrow_alone or recipe.owned.ownership.owns,
        gradient_as_bucket_view=True,  # saves a copy of the gradients
    )


class FullyShard(ModelParallelStrategy):
    """FSDP2 over all processes, without tensor parallelism."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shard over all processes: Lightning's own default is data parallelism over machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
