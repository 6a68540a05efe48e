"""Reorder a dense model's neurons and groups of heads, the most important first: every prefix gets better.

A permutation of a layer's neurons (rows of gate and up, columns of down) or of its groups (rows of q, k and
v, columns of o) leaves the full model's function as it is, but for the order in which numbers are added.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.checkpoint.weights import model_from, weights_of
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.measure.importance import Importance

RULES = ("contribution", "activation", "magnitude", "random")
"""contribution: activation x the norm of the neuron's column of down_proj, which is what it adds to the
residual stream (Wanda's product, https://arxiv.org/abs/2306.11695); activation: Minitron's; magnitude:
norms of weights alone."""
CANDIDATES = 6
"""Layers whose removal is tried for each that is dropped."""
LOGITS_TOLERANCE = 1e-4
"""Largest difference that another order of adding may make, relative to the largest logit, in fp32."""


def order_model(model: ElasticLM, importance: Importance, rule: str = "contribution") -> ElasticLM:
    """Return a copy of the model with the neurons and groups of each layer in order of importance."""
    tensors = dict(weights_of(model))
    config = model.config
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        neurons_F, groups_G = _scores(tensors, prefix, config, importance, layer, rule)
        rows_F = neurons_F.argsort(descending=True, stable=True)
        queries_Q, keys_K = _head_rows(config, groups_G.argsort(descending=True, stable=True))
        _permute(tensors, f"{prefix}.mlp", ("gate_proj", "up_proj"), rows_F)
        _permute_columns(tensors, f"{prefix}.mlp.down_proj", rows_F)
        _permute(tensors, f"{prefix}.self_attn", ("q_proj",), queries_Q)
        _permute(tensors, f"{prefix}.self_attn", ("k_proj", "v_proj"), keys_K)
        _permute_columns(tensors, f"{prefix}.self_attn.o_proj", queries_Q)
    return model_from(config, tensors).to(model.device).eval()


def drop_layers(
    num_layers: int,
    importance: Importance,
    losses_of: Callable[[Sequence[tuple[int, ...]]], Sequence[float]],
    count: int,
) -> list[tuple[int, ...]]:
    """Drop layers one at a time, each time the one whose loss is least.

    Args:
        num_layers: layers of the full model.
        importance: layers of little influence are tried first.
        losses_of: the loss of the model for each choice of the layers that run.
        count: layers to drop.

    Returns:
        The layers that are left after 1, 2, ... `count` drops.
    """
    left = tuple(range(num_layers))
    steps = []
    for _ in range(count):
        ranked = sorted(left, key=lambda layer: float(importance.layers_L[layer]))[:CANDIDATES]
        choices = [tuple(other for other in left if other != layer) for layer in ranked]
        losses = losses_of(choices)
        left = choices[min(range(len(choices)), key=losses.__getitem__)]
        steps.append(left)
    return steps


@torch.no_grad()
def check_same(model: ElasticLM, ordered: ElasticLM, tokens_BT: Tensor) -> float:
    """Return by how much two models' logits differ, relative to the largest; their greedy tokens are equal.

    Raises:
        NestlingError: if they differ by more than another order of adding explains, which is a bug of ours.
    """
    tokens_BT = tokens_BT[:1].to(model.device)
    ours_BTV, theirs_BTV = ordered(tokens_BT), model(tokens_BT)
    difference = float((ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max())
    if difference > LOGITS_TOLERANCE or not torch.equal(ours_BTV.argmax(-1), theirs_BTV.argmax(-1)):
        raise NestlingError(
            f"ordering changed the full model (logits by {difference:.1e} of the largest); please report this"
        )
    return difference


def _scores(
    tensors: dict[str, Tensor],
    prefix: str,
    config: ElasticConfig,
    importance: Importance,
    layer: int,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Return the scores of a layer's neurons [F] and groups [G]."""
    neurons_F, groups_G = importance.neurons_LF[layer], importance.groups_LG[layer]
    if rule == "random":
        generator = torch.Generator().manual_seed(layer)
        return torch.rand(len(neurons_F), generator=generator), torch.rand(len(groups_G), generator=generator)
    columns_F = tensors[f"{prefix}.mlp.down_proj.weight"].double().norm(dim=0).cpu()
    if rule == "contribution":
        return neurons_F * columns_F, groups_G
    if rule == "activation":
        return neurons_F, groups_G
    gate_F, up_F = (
        tensors[f"{prefix}.mlp.{name}.weight"].double().norm(dim=1).cpu() for name in ("gate_proj", "up_proj")
    )
    columns_Q = tensors[f"{prefix}.self_attn.o_proj.weight"].double().norm(dim=0).cpu()
    return gate_F * up_F * columns_F, columns_Q.reshape(config.num_key_value_heads, -1).norm(dim=1)


def _head_rows(config: ElasticConfig, order_G: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of q and of k in the order of their groups."""
    wide = config.heads_per_group * config.head_dim
    queries_GR = torch.arange(config.num_attention_heads * config.head_dim).reshape(-1, wide)
    keys_GK = torch.arange(config.num_key_value_heads * config.head_dim).reshape(-1, config.head_dim)
    return queries_GR[order_G].flatten(), keys_GK[order_G].flatten()


def _permute(tensors: dict[str, Tensor], prefix: str, names: tuple[str, ...], rows: Tensor) -> None:
    for name in names:
        for kind in ("weight", "bias"):
            if (key := f"{prefix}.{name}.{kind}") in tensors:
                tensors[key] = tensors[key][rows.to(tensors[key].device)]


def _permute_columns(tensors: dict[str, Tensor], prefix: str, columns: Tensor) -> None:
    key = f"{prefix}.weight"
    tensors[key] = tensors[key][:, columns.to(tensors[key].device)]
