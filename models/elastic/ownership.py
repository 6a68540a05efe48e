"""What a member may own, and the shapes of it: a frozen value that a recipe and a model folder hold.

The full model owns nothing, and a prefix of its layers at full width, whose states, keys and values are the
full model's, owns its final norm alone.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity

FINAL_NORM = "norm.weight"


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """The kinds of weights that a member owns.

    Args:
        norms: gains of RMSNorm.
        rank: rank of the additions to its matrices; 0 for none.
        alpha: LoRA's: additions are scaled by alpha / rank; 0 stands for the rank.
    """

    norms: bool = False
    rank: int = 0
    alpha: float = 0.0

    @property
    def owns(self) -> bool:
        """True if there is anything to own."""
        return self.norms or self.rank > 0

    @property
    def scaled_by(self) -> float:
        """LoRA's alpha."""
        return self.alpha or self.rank

    def shapes(self, config: ElasticConfig, granularity: Granularity) -> dict[str, tuple[int, ...]]:
        """Return name and shape of each tensor that the member owns.

        >>> config = ElasticConfig(
        ...     vocab_size=8,
        ...     hidden_size=16,
        ...     intermediate_size=32,
        ...     num_hidden_layers=4,
        ...     num_attention_heads=4,
        ...     num_key_value_heads=2,
        ... )
        >>> narrow, exit = Granularity.parse("ffn=0.5,layers=3"), Granularity.parse("layers=0-1")
        >>> list(Ownership(norms=True).shapes(config, narrow))[:2]
        ['layers.3.input_layernorm.weight', 'layers.3.post_attention_layernorm.weight']
        >>> Ownership(norms=True, rank=2).shapes(config, exit)
        {'norm.weight': (16,)}
        """
        plan = granularity.resolve(config)
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in () if plan.is_layer_prefix else plan.layers:
            for name, shape in layer.shapes(config).items():
                full_name = f"layers.{layer.index}.{name}"
                if self.norms and name.endswith("norm.weight"):
                    shapes[full_name] = shape
                elif self.rank and len(shape) == 2:
                    path = full_name.removesuffix(".weight")
                    shapes[f"{path}.lora_A.weight"] = (self.rank, shape[1])
                    shapes[f"{path}.lora_B.weight"] = (shape[0], self.rank)
        return shapes | ({FINAL_NORM: (config.hidden_size,)} if self.norms and not plan.is_full else {})

    def count(self, config: ElasticConfig, granularity: Granularity) -> int:
        """Return how many numbers the member owns."""
        return sum(map(math.prod, self.shapes(config, granularity).values()))


class Owner(NamedTuple):
    """A member that owns weights."""

    name: str
    """In the family: a label."""
    granularity: Granularity
    ownership: Ownership


def is_owned(name: str) -> bool:
    """Return whether a parameter of an elastic model, by name, is a member's own."""
    return name.startswith("owned.")
