"""What a member has for itself, beside the prefixes of matrices that it shares with the full model.

    RMSNorm gains        of the layers that it runs, and the final one: 0.2 % of a small model's weights
    low-rank additions   to its prefix of each matrix, in LoRA's convention (https://arxiv.org/abs/2106.09685)

A pass asks for what its member owns by the member's layers and
widths; names are labels. Parameters are called as in the full model, or as peft calls them:
`layers.0.input_layernorm.weight`, `layers.0.mlp.gate_proj.lora_A.weight`, `norm.weight`.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity, LayerPlan
from models.elastic.linear import LowRank
from models.elastic.norm import RMSNorm
from models.elastic.ownership import FINAL_NORM, Owner, Ownership


class OwnedAttention(nn.Module):
    """A member's own part of an attention; None where it has the full model's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj: LowRank | None = None
        self.k_proj: LowRank | None = None
        self.v_proj: LowRank | None = None
        self.o_proj: LowRank | None = None
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None


class OwnedMLP(nn.Module):
    """A member's own part of a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj: LowRank | None = None
        self.up_proj: LowRank | None = None
        self.down_proj: LowRank | None = None


class OwnedLayer(nn.Module):
    """A member's own part of a layer; nothing by default."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm: RMSNorm | None = None
        self.post_attention_layernorm: RMSNorm | None = None
        self.pre_feedforward_layernorm: RMSNorm | None = None
        self.post_feedforward_layernorm: RMSNorm | None = None
        self.self_attn = OwnedAttention()
        self.mlp = OwnedMLP()

    @staticmethod
    def make(config: ElasticConfig, plan: LayerPlan, ownership: Ownership) -> "OwnedLayer":
        """Return a layer's norms, all 1, and additions."""
        layer = OwnedLayer()
        for name, shape in plan.shapes(config).items():
            one: nn.Module
            if ownership.norms and name.endswith("norm.weight"):
                one = RMSNorm(shape[0], config)
            elif ownership.rank and len(shape) == 2:
                one = LowRank(*shape, rank=ownership.rank, alpha=ownership.scaled_by)
            else:
                continue
            path, _, part = name.removesuffix(".weight").rpartition(".")
            setattr(layer.get_submodule(path), part, one)
        return layer

    def gains(self) -> "OwnedLayer":
        """Return its norms alone."""
        layer = OwnedLayer()
        layer.input_layernorm = self.input_layernorm
        layer.post_attention_layernorm = self.post_attention_layernorm
        layer.pre_feedforward_layernorm = self.pre_feedforward_layernorm
        layer.post_feedforward_layernorm = self.post_feedforward_layernorm
        layer.self_attn.q_norm, layer.self_attn.k_norm = self.self_attn.q_norm, self.self_attn.k_norm
        return layer


NOTHING = OwnedLayer()
"""What the full model owns of a layer."""


class Parts:
    """What a member's pass runs with in place of the full model's norms and in addition to its matrices."""

    norm: RMSNorm | None
    """The final norm."""

    def layer(self, index: int) -> OwnedLayer:
        """Return the parts of the full model's layer of this number."""
        raise NotImplementedError

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return the member's tensor of this name, given the prefix of the full model's.

        Args:
            name: as in the full model without `model.`, the layer's number the full model's.
            tensor: the prefix.
        """
        if name == FINAL_NORM:
            return tensor if self.norm is None else self.norm.weight.detach()
        if not name.startswith("layers."):
            return tensor
        index, _, rest = name.removeprefix("layers.").partition(".")
        path, _, kind = rest.rpartition(".")
        place, _, part = path.rpartition(".")
        own = getattr(self.layer(int(index)).get_submodule(place), part)
        if isinstance(own, RMSNorm):
            return own.weight.detach()
        return own.add_to(tensor).detach() if isinstance(own, LowRank) and kind == "weight" else tensor


class Owned(nn.Module, Parts):
    """What one member of a family owns.

    Args:
        config: the full model's shape.
        name: the member's in the family, a label.
        granularity: the member.
        ownership: the kinds of weights.

    Raises:
        UsageError: if the granularity does not fit the model.
    """

    def __init__(
        self, config: ElasticConfig, name: str, granularity: Granularity, ownership: Ownership
    ) -> None:
        super().__init__()
        self.name, self.granularity, self.ownership = name, granularity, ownership
        self.plan = granularity.resolve(config)
        assert not self.plan.is_full, f"{name} is the full model, which owns nothing"
        layers = () if self.plan.is_layer_prefix else self.plan.layers
        self.layers = nn.ModuleDict(
            {str(one.index): OwnedLayer.make(config, one, ownership) for one in layers}
        )
        final = RMSNorm(config.hidden_size, config) if ownership.norms else None
        self.norm: RMSNorm | None = final

    def layer(self, index: int) -> OwnedLayer:
        """See `Parts`."""
        key = str(index)
        return cast(OwnedLayer, self.layers[key]) if key in self.layers else NOTHING

    @property
    def owner(self) -> Owner:
        """The member and what kinds of weights it owns."""
        return Owner(self.name, self.granularity, self.ownership)

    @property
    def num_bytes(self) -> int:
        """Bytes of its own weights."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @torch.no_grad()
    def start_from(self, full: Mapping[str, Tensor], generator: torch.Generator | None = None) -> None:
        """Take the full model's gains, and draw additions that change nothing yet, as LoRA does."""
        for name, parameter in self.named_parameters():
            if name.endswith("lora_A.weight"):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("lora_B.weight"):
                nn.init.zeros_(parameter)
            else:
                parameter.copy_(full[name])
