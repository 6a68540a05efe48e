"""The settings of stretched rotary positions; models/elastic/rope.py computes their frequencies.

The fields carry Hugging Face's names, so that a `config.json` is read and written field by field.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from models.base.errors import NestlingError

RopeType = Literal["linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The rule by which a model's rotary frequencies were stretched after its first training.

    Args:
        rope_type: the rule.
        factor: ratio of the new context to the old one, 1 or more.
        original_max_position_embeddings: the context before, in tokens (llama3 and yarn).
        low_freq_factor: wavelengths above the original context / this are divided by the factor (llama3).
        high_freq_factor: wavelengths below the original context / this are kept (llama3).
        beta_fast: dimensions that turn more often than this in the original context are kept (yarn).
        beta_slow: dimensions that turn less often than this are divided by the factor (yarn).
        attention_factor: cosines and sines are multiplied by it (yarn, "mscale" in the paper).
        truncate: whether the ends of the ramp are rounded to whole dimensions (yarn).

    Raises:
        NestlingError: listing every field that cannot be.
    """

    rope_type: RopeType
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.rope_type not in get_args(RopeType):
            problems.append(f"rope_type={self.rope_type!r} is not one of {', '.join(get_args(RopeType))}")
        if not self.factor >= 1:
            problems.append(f"factor={self.factor} must be at least 1")
        if self.rope_type != "linear" and self.original_max_position_embeddings < 1:
            problems.append(f"{self.rope_type} needs original_max_position_embeddings, at least 1")
        if self.rope_type == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            problems.append(
                f"low_freq_factor={self.low_freq_factor} must be above 0 and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if self.rope_type == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            problems.append(
                f"beta_slow={self.beta_slow} must be above 0 and below beta_fast={self.beta_fast}"
            )
        if problems:
            raise NestlingError("rope scaling: " + "; ".join(problems))


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """Return yarn's factor of cosines and sines (its equation 22; DeepSeek's two exponents)."""

    def scale(exponent: float) -> float:
        return 0.1 * exponent * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
