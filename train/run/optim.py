"""AdamW in two groups, and the learning rate as a pure function of the absolute step.

Decay belongs to matrices. A norm's gain or a bias would be pulled towards 0, which is not where it does
nothing. An embedding's row meets a gradient only when its token occurs, but decay at every step, so
that rare tokens would shrink the most; a tied vocabulary head is that same matrix.
"""

import math

from torch import nn
from torch.optim import AdamW

from train.recipe.sections import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """Return AdamW over the parameters that require a gradient, in the model's order, a tied one once.

    The first group decays (matrices), the second does not (1-D parameters, embeddings); a group may be
    empty. The learning rate of both is the peak: `learning_rate_factor` scales it.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [parameter.dim() > 1 and id(parameter) not in embeddings for parameter in parameters]
    groups = [
        {"params": [p for p, yes in zip(parameters, decays, strict=True) if yes is wanted], **extra}
        for wanted, extra in ((True, {"weight_decay": config.weight_decay}), (False, {"weight_decay": 0.0}))
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=config.fused)


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
