"""Measure on text how much each neuron, each group of heads and each layer of a model does.

    neurons   root mean square of a neuron's activation    Minitron, https://arxiv.org/abs/2407.14679, 3.1
    groups    root mean square of what o_proj makes of a group's heads
    layers    1 - cosine of what goes in and comes out     ShortGPT, https://arxiv.org/abs/2403.03853

One pass of the full model over the text gives all three.

B rows, T positions, D model, F ffn, G groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from models.base.errors import NestlingError
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The importance of neurons, groups and layers; in fp64, larger is more important.

    Args:
        neurons_LF: root mean square of each neuron's activation, by layer.
        groups_LG: root mean square of what each group adds to the residual stream, by layer.
        layers_L: mean of 1 - cos(input, output) of each layer.
    """

    neurons_LF: Tensor
    groups_LG: Tensor
    layers_L: Tensor


@torch.no_grad()
def measure_importance(model: ElasticLM, batches: Iterable[Tensor]) -> Importance:
    """Run the full model over token ids [B, T], and measure.

    Raises:
        NestlingError: if there is no token.
    """
    sums = _Sums(model.config)
    blocks = enumerate(model.model.layers)
    handles = [handle for index, block in blocks for handle in sums.watch(index, block)]
    try:
        for tokens_BT in batches:
            model.states(tokens_BT.to(model.device))
            sums.num_tokens += tokens_BT.numel()
    finally:
        for handle in handles:
            handle.remove()
    if sums.num_tokens == 0:
        raise NestlingError("importance: the text has no token to measure on; give a longer one")
    return Importance(
        neurons_LF=(sums.neurons_LF / sums.num_tokens).sqrt(),
        groups_LG=(sums.groups_LG / sums.num_tokens).sqrt(),
        layers_L=sums.layers_L / sums.num_tokens,
    )


class _Sums:
    """Sums over tokens, which hooks on the modules of each layer add to."""

    def __init__(self, config: ElasticConfig) -> None:
        layers, self._config = config.num_hidden_layers, config
        self.num_tokens = 0
        self.neurons_LF = torch.zeros(layers, config.intermediate_size, dtype=torch.float64)
        self.groups_LG = torch.zeros(layers, config.num_key_value_heads, dtype=torch.float64)
        self.layers_L = torch.zeros(layers, dtype=torch.float64)

    def watch(self, index: int, block: Any) -> list[Any]:
        def neurons(_: Any, inputs: tuple[Tensor]) -> None:
            self.neurons_LF[index] += _sum_of_squares(inputs[0]).cpu()

        def groups(module: Any, inputs: tuple[Tensor]) -> None:
            self.groups_LG[index] += self._energy(inputs[0], module.weight).cpu()

        def layer(_: Any, inputs: tuple[Tensor, ...], output_BTD: Tensor) -> None:
            cosines_BT = cosine_similarity(inputs[0].double(), output_BTD.double(), dim=-1)
            self.layers_L[index] += (1 - cosines_BT).sum().cpu()

        return [
            block.mlp.down_proj.register_forward_pre_hook(neurons),
            block.self_attn.o_proj.register_forward_pre_hook(groups),
            block.register_forward_hook(layer),
        ]

    def _energy(self, y_BTQ: Tensor, weight_DQ: Tensor) -> Tensor:
        """Return the summed squares of what each group's heads add to the residual stream [G]."""
        count = self._config.num_key_value_heads
        parts = zip(y_BTQ.chunk(count, -1), weight_DQ.chunk(count, -1), strict=True)
        return torch.stack([_sum_of_squares(y @ weight.T).sum() for y, weight in parts])


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum over all but the last dimension, in fp64."""
    return x.double().square().flatten(0, -2).sum(0)
