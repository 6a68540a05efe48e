"""AdamW in groups, and the learning rate as a pure function of the absolute step.

Decay belongs to matrices. A norm's gain or a bias would be pulled towards 0, which is not where it does
nothing. An embedding's row meets a gradient only when its token occurs, but decay at every step, so
that rare tokens would shrink the most; a tied vocabulary head is that same matrix.

What members own may learn faster than what everybody shares: low-rank additions, one of whose factors is
zero at first, want about ten times the learning rate of whole matrices (LoRA+, 2402.12354, section 4).
"""

import math
from collections.abc import Callable

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from train.recipe.sections import OptimConfig

OWNED = "owned"
"""The submodule of an elastic model that has what members own."""


def make_optimizer(model: nn.Module, config: OptimConfig, *, owned: OptimConfig | None = None) -> AdamW:
    """Return AdamW over the parameters that require a gradient, in the model's order, a tied one once.

    The first group decays (matrices), the second does not (1-D parameters, embeddings); a group may be
    empty. Their learning rate is the peak: `make_schedule` scales it. What members own makes two more
    such groups if its learning rate, or what that falls to, is another.
    """
    groups = [
        {"params": params, "lr": group.lr, "weight_decay": group.weight_decay * decays}
        for (group, decays), params in _groups(model, config, owned).items()
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=config.fused)


def make_schedule(
    optimizer: AdamW,
    model: nn.Module,
    config: OptimConfig,
    *,
    max_steps: int,
    first_step: int = 0,
    owned: OptimConfig | None = None,
) -> LambdaLR:
    """Return the schedule of an optimizer that `make_optimizer` made from the same model and configs.

    Args:
        optimizer: whose learning rates it sets.
        model: whose parameters it has.
        config: of what all share.
        max_steps: where each cosine ends.
        first_step: optimizer steps done already, when a run is resumed.
        owned: of what members own; None: as of all else.
    """
    groups = [group for group, _ in _groups(model, config, owned)]
    return LambdaLR(optimizer, [_factors(group, max_steps, first_step) for group in groups])


def _groups(
    model: nn.Module, config: OptimConfig, owned: OptimConfig | None
) -> dict[tuple[OptimConfig, bool], list[nn.Parameter]]:
    """Return the parameters by how they learn and by whether they decay."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[OptimConfig, bool], list[nn.Parameter]] = {(config, True): [], (config, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = owned if owned is not None and name.startswith(f"{OWNED}.") else config
            decays = parameter.dim() > 1 and id(parameter) not in embeddings
            groups.setdefault((group, decays), []).append(parameter)
    return groups


def _factors(config: OptimConfig, max_steps: int, first_step: int) -> Callable[[int], float]:
    return lambda done: learning_rate_factor(first_step + done, config, max_steps)


def learning_rate_factor(step: int, config: OptimConfig, max_steps: int) -> float:
    """Return the fraction of the peak learning rate at an optimizer step: linear warm-up, then half a cosine.

    It depends on the absolute step alone, so that a resumed run goes on exactly.

    Args:
        step: from 0; the first of `warmup_steps` is already above 0.
        config: the recipe's `optim` section.
        max_steps: where the cosine reaches `min_lr_ratio`; it stays there.

    >>> config = OptimConfig(warmup_steps=2, min_lr_ratio=0.1)
    >>> [round(learning_rate_factor(step, config, 6), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine
