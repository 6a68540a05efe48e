"""Steps that would do harm are skipped on the device; three in a row take the run back.

A step is judged by its gradient norm: not finite, or its logarithm more than `sigma` deviations above its
running mean. Norms are log-normal enough for that, and the norm is that of the optimizer step, so the verdict
depends neither on micro-batches nor on the number of processes. As in OLMo-core's SkipStepOptimizer
(https://github.com/allenai/OLMo-core), nothing waits for the device: the verdict is a tensor, which fused
AdamW takes as a gradient scaler's `found_inf`, and the counters are read where metrics are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

IN_A_ROW = 3
"""Number of successive skipped steps after which the weights, not the data, are to blame."""
WINDOW = 128
"""Steps that the running mean and deviation look back."""
WARM_UP = 64
"""Steps before which only norms that are not finite are skipped."""
LEAST_DEVIATION = 0.05
"""Smallest deviation of the logarithm: on an even stretch, a norm a fifth higher is still no outlier."""

COUNTERS = ("seen", "mean", "variance", "skipped", "in_row", "diverged")


class Guard:
    """Judges steps, and counts; part of a resumable state, so that a resumed run judges in the same way.

    Args:
        sigma: deviations above the mean that are too many; 0 judges no step.
        counters: an earlier guard's counters, as `counters` gave them; those that are missing start at 0.
    """

    def __init__(self, sigma: float, counters: Mapping[str, float] | None = None) -> None:
        self.sigma = sigma
        counters = counters or {}
        self.rollbacks = int(counters.get("rollbacks", 0))
        self.values = {name: torch.tensor(float(counters.get(name, 0))) for name in COUNTERS}

    def judge(self, norm: Tensor) -> Tensor:
        """Return 1.0 if the step with this gradient norm must not be taken, else 0.0, on the device.

        Args:
            norm: Norm of the optimizer step's gradient, before clipping; a scalar.
        """
        seen, mean, variance, skipped, in_row, diverged = (
            value.to(norm.device) for value in self.values.values()
        )
        log = norm.detach().float().clamp_min(torch.finfo(torch.float32).tiny).log()
        limit = mean + self.sigma * variance.sqrt().clamp_min(LEAST_DEVIATION)
        bad = ~norm.isfinite() | ((seen >= WARM_UP) & (log > limit))
        idle = norm == 0  # nobody had a turn, which says nothing of the steps in which somebody has
        # a mean of all at first, an exponential one later; what is skipped teaches nothing
        rate = torch.where(bad | idle, 0.0, 1 / (seen + 1).clamp_max(WINDOW))
        off = torch.where(bad | idle, 0.0, log - mean)
        in_row = torch.where(idle, in_row, (in_row + 1) * bad)
        after = (
            seen + ~(bad | idle),
            mean + rate * off,
            (1 - rate) * (variance + rate * off**2),
            skipped + bad,
            in_row,
            torch.maximum(diverged, (in_row >= IN_A_ROW).float()),
        )
        self.values = dict(zip(COUNTERS, after, strict=True))
        return bad.float()

    @property
    def skipped(self) -> int:
        """Steps skipped since the run began; waits for the device."""
        return int(self.values["skipped"])

    @property
    def diverged(self) -> bool:
        """True if three steps in a row were skipped since the guard was made; waits for the device."""
        return bool(self.values["diverged"])

    def counters(self) -> dict[str, float]:
        """Return all that the next judgement depends on; exact, since each is an fp32 number."""
        return {"rollbacks": self.rollbacks, **{name: float(value) for name, value in self.values.items()}}

    def after_rollback(self) -> dict[str, float]:
        """Return the counters to go on with from an earlier state, without the mean and deviation.

        A norm that has risen for good would otherwise be skipped forever.
        """
        return {"skipped": float(self.values["skipped"]), "rollbacks": self.rollbacks + 1}


def skip_if(flag: Tensor, optimizer: Optimizer) -> None:
    """Make the optimizer's next step leave weights, moments and counters alone if `flag` is 1."""
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = flag  # type: ignore[attr-defined]
    elif flag.item():  # waits for the device: only the fused kernel can decide there
        optimizer.zero_grad(set_to_none=True)
