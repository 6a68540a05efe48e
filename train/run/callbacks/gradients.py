"""Measures each member's gradient on the shared weights, and its cosine with the full model's.

Every student's gradient is taken by itself, on a few held-out rows and every position of them, so that
members compare with each other and a step with the next. Nothing that training holds is touched: no
gradient is added to the parameters' own, no random number is drawn.
"""

import math
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.ownership import is_owned
from train.data.batch import Batch
from train.objective.joint_loss import joint_loss
from train.objective.sampler import Slot, StepPlan
from train.recipe.sections import LossConfig
from train.run.callbacks.metrics import Metrics
from train.run.callbacks.step import StepCallback
from train.run.fsdp import gather_model
from train.run.metrics import MetricsLog
from train.run.module import JointModule

MAX_ROWS = 4
TINY = 1e-30  # a gradient of 0 has no direction


class Gradients(StepCallback):
    """Writes a `gradient` line every n steps.

    Args:
        log: takes the lines.
        metrics: knows how many tokens were trained on.
        members: the granularities to compare, the full one among them.
        batch: validation tokens and labels [B, T], of which the first rows are used.
        every: optimizer steps between lines.
    """

    def __init__(
        self,
        log: MetricsLog,
        metrics: Metrics,
        members: Mapping[str, Granularity],
        batch: tuple[Tensor, Tensor],
        *,
        every: int,
    ) -> None:
        super().__init__(every=every)
        self.lines, self.metrics, self.members = log, metrics, dict(members)
        self.tokens_BT, self.labels_BT = (rows_BT[:MAX_ROWS] for rows_BT in batch)

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Measure every member and write the line."""
        model = gather_model(module.model, wanted=trainer.is_global_zero)
        if model is None:
            return
        device = model.lm_head.weight.device
        batch = Batch(
            tokens_BT=self.tokens_BT.to(device),
            labels_BT=self.labels_BT.to(device),
            step=module.step,
            first_row=0,
            num_rows=len(self.tokens_BT),
            num_valid=int((self.labels_BT >= 0).sum()),
        )
        found = compare_gradients(model, self.members, batch, module.recipe.loss)
        self.lines.write("gradient", module.step, {"tokens": self.metrics.tokens, **found})


def compare_gradients(
    model: ElasticLM, members: Mapping[str, Granularity], batch: Batch, config: LossConfig
) -> dict[str, float]:
    """Return norm and direction of the gradient of each member's loss, a mean over the batch's tokens.

    Args:
        model: The elastic model, not sharded.
        members: Every granularity by name, the full one among them.
        batch: All rows of a step.
        config: The members' loss; the batch's step says how far it is ramped.

    Returns:
        `gradient/S/norm` of each member, and `gradient/S/cosine` of each smaller one: of the angle
        between its gradient and the full model's on the weights that it has, which are those where its
        own gradient is not 0. The loss is that of its logits, scaled as a narrow member's; what hidden
        states add is left out.
    """
    full = next(name for name, granularity in members.items() if granularity == FULL)
    theirs = _gradient(model, members, batch, StepPlan(full=1.0, exits=(), slots=()), config)
    found = {f"gradient/{full}/norm": math.sqrt(_inner(theirs, theirs))}
    for name in members:
        if name == full:
            continue
        # A layer prefix, too, has a pass of its own here: as an exit it would need the full model's graph.
        plan = StepPlan(full=0.0, exits=(), slots=(Slot(name, range(batch.num_rows)),))
        ours = _gradient(model, members, batch, plan, config)
        norm = math.sqrt(_inner(ours, ours))
        on_its_weights = math.sqrt(_inner(theirs, (b * (a != 0) for a, b in zip(ours, theirs, strict=True))))
        found[f"gradient/{name}/norm"] = norm
        found[f"gradient/{name}/cosine"] = _inner(ours, theirs) / max(norm * on_its_weights, TINY)
    return found


def _gradient(
    model: ElasticLM,
    members: Mapping[str, Granularity],
    batch: Batch,
    plan: StepPlan,
    config: LossConfig,
) -> list[Tensor]:
    """Return the gradient of each shared parameter, kept apart from what training adds up in `.grad`."""
    parameters = [one for name, one in model.named_parameters() if not is_owned(name)]
    loss = joint_loss(model, members, batch, plan, config, block=1).total
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def _inner(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    return float(torch.stack([(a * b).sum() for a, b in zip(ours, theirs, strict=True)]).sum())
