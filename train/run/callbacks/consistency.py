"""Measures every member on held-out text while it trains: loss, match, KL, alpha, and what alpha promises.

The predicted speed-up is that of the formula in models/decode/tune/predict.py at its best gamma. It assumes
that a draft step costs the member's fraction of the operations of a token, that checking a few tokens costs
what one does, and that the host costs nothing: the same weights promise the same on any machine. The speed of
this machine is measured by `nestling search`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from models.checkpoint.folder import Member
from models.decode.tune.predict import best_speedup
from models.elastic.count import count_flops
from models.elastic.granularity import FULL, Granularity
from models.measure.consistency import evaluate_family
from train.run.callbacks.metrics import Metrics
from train.run.callbacks.step import StepCallback
from train.run.fsdp import gather_model
from train.run.metrics import MetricsLog
from train.run.module import JointModule


class Consistency(StepCallback):
    """Writes a `valid` line every n steps.

    Args:
        log: takes the lines.
        metrics: knows how many tokens were trained on.
        members: the granularities to measure.
        batches: validation tokens and labels [B, T].
        every: optimizer steps between measurements.
        shared_block: see `evaluate_family`.
    """

    def __init__(
        self,
        log: MetricsLog,
        metrics: Metrics,
        members: Mapping[str, Granularity],
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        every: int,
        shared_block: int | None = None,
    ) -> None:
        super().__init__(every=every)
        self.lines, self.metrics, self.members = log, metrics, dict(members)
        self.batches, self.shared_block = batches, shared_block
        self.latest: list[Member] = []

    def on_step(self, trainer: pl.Trainer, module: JointModule) -> None:
        """Measure all members and write the line."""
        model = gather_model(module.model, wanted=trainer.is_global_zero)
        if model is None:
            return
        self.latest = evaluate_family(model, self.members, self.batches, shared_block=self.shared_block)
        line: dict[str, Any] = {"tokens": self.metrics.tokens}
        for member in self.latest:
            for measure in ("loss", "match", "kl", "alpha"):
                line[f"valid/{member.name}/{measure}"] = getattr(member, measure)
            granularity = self.members[member.name]
            if granularity != FULL and member.alpha is not None:
                cost = count_flops(model.config, granularity) / count_flops(model.config)
                line[f"valid/{member.name}/speedup"] = best_speedup(member.alpha, cost)
        self.lines.write("valid", module.step, line)
