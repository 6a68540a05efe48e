"""AdamW in groups, and the learning rate as a pure function of the absolute step.

Decay belongs to matrices. A norm's gain or a bias would be pulled towards 0, which is not where it does
nothing. An embedding's row meets a gradient only when its token occurs, but decay at every step, so
that rare tokens would shrink the most; a tied vocabulary head is that same matrix.

What members own may learn faster than what everybody shares: low-rank additions, one of whose factors is
zero at first, want about ten times the learning rate of whole matrices (LoRA+, 2402.12354, section 4).
"""

import math

from torch import nn
from torch.optim import AdamW

from train.recipe.sections import OptimConfig

OWNED = "owned"
"""The submodule of an elastic model that has what members own."""


def make_optimizer(model: nn.Module, config: OptimConfig, *, owned_lr: float | None = None) -> AdamW:
    """Return AdamW over the parameters that require a gradient, in the model's order, a tied one once.

    The first group decays (matrices), the second does not (1-D parameters, embeddings); a group may be
    empty. Their learning rate is the peak: `learning_rate_factor` scales it. What members own makes two more
    such groups if it has a learning rate of its own.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(config.lr, True): [], (config.lr, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = owned_lr if owned_lr is not None and name.startswith(f"{OWNED}.") else config.lr
            decays = parameter.dim() > 1 and id(parameter) not in embeddings
            groups.setdefault((lr, decays), []).append(parameter)
    described = [
        {"params": params, "lr": lr, "weight_decay": config.weight_decay * decays}
        for (lr, decays), params in groups.items()
    ]
    return AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps, fused=config.fused)


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
