"""A lower learning rate for the neurons and heads that no narrow member has.

Neurons that learn more slowly take over less of what the model learns; so more of it comes to lie in the
first ones, which the members share. (Nested dropout, 1402.0915, orders units to the same end by dropping the
last ones in a part of the samples; this takes no pass of its own.)

AdamW has one rate for a whole tensor, and its step does not depend on the gradient's size; so each step is
taken whole and then shortened where it is to be shorter, weight decay with it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.elastic.granularity import Plan
from models.elastic.model import ElasticLM
from train.run.fsdp import local, shard_like


class _Slowed(NamedTuple):
    """A matrix or bias of which a part learns more slowly, as this process holds it, and by what factor."""

    parameter: nn.Parameter
    factor: Tensor


def inner_shapes(model: ElasticLM, plans: Iterable[Plan]) -> dict[str, tuple[int, ...]]:
    """Return the part of each tensor that some narrow member has, where that is not all of it.

    The full model and its first layers are not narrow; in a layer that no
    narrow member runs nothing is outer.

    >>> from models.elastic.config import ElasticConfig
    >>> from models.elastic.granularity import Granularity
    >>> config = ElasticConfig(
    ...     vocab_size=8,
    ...     hidden_size=16,
    ...     intermediate_size=32,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=4,
    ...     num_key_value_heads=2,
    ... )
    >>> plans = [Granularity.parse(text).resolve(config) for text in ("full", "layers=0", "ffn=0.5")]
    >>> shapes = inner_shapes(ElasticLM(config), plans)
    >>> len(shapes), shapes["layers.0.mlp.up_proj.weight"], shapes["layers.1.mlp.down_proj.weight"]
    (6, (16, 16), (16, 16))
    """
    largest: dict[str, tuple[int, ...]] = {}
    for plan in plans:
        for layer in () if plan.is_layer_prefix else plan.layers:
            for part, shape in layer.shapes(model.config).items():
                name = f"layers.{layer.index}.{part}"
                before = largest.get(name, shape)
                largest[name] = tuple(max(pair) for pair in zip(before, shape, strict=True))
    whole = {name: tuple(parameter.shape) for name, parameter in model.model.named_parameters()}
    return {name: shape for name, shape in largest.items() if shape != whole[name]}


def slow_outer(optimizer: Optimizer, model: ElasticLM, plans: Iterable[Plan], ratio: float) -> None:
    """Shorten an optimizer's steps to `ratio` outside of what narrow members have; 1 changes nothing.

    Args:
        optimizer: Of the model's parameters; a copy of the tensors in question is kept during its step.
        model: Its weights may be sharded over processes, by rows.
        plans: The family's members.
        ratio: Of the learning rate, above 0.
    """
    if ratio == 1:
        return
    inner, parameters = inner_shapes(model, plans), dict(model.model.named_parameters())
    slowed = [
        _Slowed(parameters[name], _factor(parameters[name], shape, ratio))
        for name, shape in inner.items()
        if parameters[name].requires_grad
    ]
    before: list[Tensor] = []

    @torch.no_grad()
    def keep(*_: Any) -> None:
        before.extend(local(one.parameter).clone() for one in slowed)

    @torch.no_grad()
    def shorten(*_: Any) -> None:
        for old, one in zip(before, slowed, strict=True):
            own = local(one.parameter)
            own.copy_(torch.lerp(old, own, one.factor))  # where the factor is 1, exactly as it was
        before.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(shorten)


def _factor(parameter: nn.Parameter, inner: tuple[int, ...], ratio: float) -> Tensor:
    """Return 1 in the inner part and the ratio elsewhere; it broadcasts to the parameter as it is here."""
    dim = next(dim for dim, size in enumerate(inner) if size != parameter.shape[dim])
    factor = torch.ones(parameter.shape[dim], dtype=parameter.dtype, device=parameter.device)
    factor[inner[dim] :] = ratio
    if dim > 0:  # FSDP2 shards rows, of which each has all columns
        return factor
    return local(shard_like(factor.view(-1, *[1] * (parameter.dim() - 1)), parameter))
