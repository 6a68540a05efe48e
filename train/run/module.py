"""Joint nested training as a LightningModule: wiring only.

Who trains is train/objective/sampler.py, what they minimise is train/objective/joint_loss.py and
train/objective/losses.py, the optimizer is train/run/optim.py; everything optional is a callback.
"""

import gc
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.distill.written import WrittenRows
from train.objective.joint_loss import joint_loss
from train.objective.losses import fade, held_config, hidden_weight
from train.objective.sampler import plan_step, resolve_turns
from train.objective.teacher import Teacher
from train.recipe.recipe import Recipe
from train.run.fsdp import gather, shard
from train.run.optim import make_optimizer, make_schedule
from train.run.outer import slow_outer
from train.run.skip_steps import Guard, skip_if


class JointModule(pl.LightningModule):
    """Trains the full model and its members together.

    Args:
        model: the elastic model.
        members: every trained granularity by name, the full one among them.
        recipe: the resolved recipe.
        first_step: optimizer steps already done, when a run is resumed.
        guard: the counters of `train/run/skip_steps.py`, when a run is resumed.
        teacher: a frozen model that the full one learns from, if any.
        written: the rows that a model continues, if any.
    """

    def __init__(
        self,
        model: ElasticLM,
        members: Mapping[str, Granularity],
        recipe: Recipe,
        *,
        first_step: int = 0,
        guard: Mapping[str, float] | None = None,
        teacher: Teacher | None = None,
        written: WrittenRows | None = None,
    ) -> None:
        super().__init__()
        self.written = written
        self.model = model
        self.members = dict(members)
        self.plans = {name: granularity.resolve(model.config) for name, granularity in members.items()}
        self.recipe = recipe
        self.sampler = resolve_turns(recipe.sampler, members, model.config)
        self.first_step = first_step
        self.guard = Guard(recipe.optim.skip_sigma, guard)
        # In a tuple, and so no submodule: nothing that is optimised, clipped, saved or sharded.
        self.teachers = () if teacher is None else (teacher,)
        self.full_config = held_config(recipe.loss.trust) if recipe.is_held else None
        self.losses: dict[str, Tensor] = {}
        self.gradient_norm = torch.zeros(())
        self.batch_ended: float | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done since the run began, resumed ones included."""
        return self.first_step + self.global_step

    def configure_model(self) -> None:
        """Shard the weights, if the strategy has a mesh of processes for it."""
        if self.device_mesh is not None:
            shard(self, self.model, self.device_mesh["data_parallel"], step="training_step")

    def on_train_start(self) -> None:
        """Move the teacher to the device: it is no submodule, so Lightning does not."""
        for teacher in self.teachers:
            teacher.place(self.trainer.strategy.root_device)
        # What is here stays: walking over every object again and again, the collector takes 2 % of a step.
        gc.freeze()

    def on_train_end(self) -> None:
        """Give the collector back what `on_train_start` took from it."""
        gc.unfreeze()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of every member's loss; Lightning averages over micro-batches and processes."""
        recipe = self.recipe
        if self.written is not None:
            batch = self.written.mix(batch, self.model, self.members)
        plan = plan_step(
            self.plans,
            self.sampler,
            seed=recipe.seed,
            step=batch.step,
            num_rows=batch.num_rows,
            weight=fade(batch.step, recipe.loss, recipe.trainer.max_steps),
            full=recipe.full_weight(batch.step),
        )
        loss = joint_loss(
            self.model,
            self.members,
            batch,
            plan,
            recipe.loss,
            block=recipe.sampler.block,
            teacher=next(iter(self.teachers), None),
            full_config=self.full_config,
            hidden=hidden_weight(batch.step, recipe.loss, recipe.trainer.max_steps),
        )
        self._keep(loss.terms, first=batch_idx % recipe.trainer.accumulate_grad_batches == 0)
        averaged_over = recipe.trainer.accumulate_grad_batches * self.trainer.world_size
        if not loss.total.requires_grad:  # no member has its turn: no gradient, by which a weight would move
            return loss.total.clone().requires_grad_()
        return loss.total * averaged_over

    def _keep(self, losses: Mapping[str, Tensor], *, first: bool) -> None:
        """Add up the step's terms for the log; no synchronisation here."""
        if first:
            self.losses = {}
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, loss.new_zeros(())) + loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note the time, after every callback's hook: until the next batch the run waits for data."""
        self.batch_ended = time.perf_counter()

    def configure_optimizers(self) -> Any:
        """Return AdamW and a schedule that is a function of the absolute step."""
        recipe = self.recipe
        optimizer = make_optimizer(self.model, recipe.optim, owned=recipe.owned_optim)
        slow_outer(optimizer, self.model, self.plans.values(), recipe.optim.outer_lr_ratio)
        schedule = make_schedule(
            optimizer,
            self.model,
            recipe.optim,
            owned=recipe.owned_optim,
            max_steps=recipe.trainer.max_steps,
            first_step=self.first_step,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, keep it for the log, which Lightning would not, and judge the step."""
        limit = gradient_clip_val or float("inf")
        # The optimizer's list: a walk over the hundreds of modules that members own takes time in every step.
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self.gradient_norm = gather(torch.nn.utils.get_total_norm(gradients)).detach()
        torch.nn.utils.clip_grads_with_norm_(trained, limit, self.gradient_norm)
        if self.guard.sigma:
            skip_if(self.guard.judge(self.gradient_norm), optimizer)
