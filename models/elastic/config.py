"""The shape of an elastic model, in Hugging Face's field names.

One class covers Llama, Mistral, Qwen2 (`attention_bias`), Qwen3 (`qk_norm`) and SmolLM3 (`no_rope_layers`);
models/checkpoint/huggingface.py maps to and from their configurations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.base.errors import NestlingError
from models.elastic.rope_scaling import RopeScaling

_MOST = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 2**24),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"), 2**14),
}
"""A damaged file may say anything, and memory is allocated before the weights show that it is wrong."""


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """Shape of the full model.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: hidden neurons of a layer's feed-forward part.
        num_hidden_layers: number of layers.
        num_attention_heads: query heads per layer.
        num_key_value_heads: key/value heads (groups) per layer; divides `num_attention_heads`.
        head_dim: width of one head, even; 0 means `hidden_size // num_attention_heads`.
        max_position_embeddings: the longest context, in tokens.
        rope_theta: base of the rotary frequencies.
        rope_scaling: the rule by which they were stretched to longer contexts; None leaves them as they are.
        no_rope_layers: for each layer 1 if its queries and keys are rotated, and 0 if it has no positions
            (SmolLM3; the name is Hugging Face's, and so are the values); None rotates all.
        rms_norm_eps: epsilon of every RMSNorm.
        tie_word_embeddings: whether the vocabulary head is the embedding matrix.
        attention_bias: bias on the q, k and v projections (Qwen2).
        qk_norm: RMSNorm on each query and key head (Qwen3).
        initializer_range: standard deviation of the initial weights.
        bos_token_id: token that starts a text, if any.
        eos_token_id: token that ends a text, if any; several as a tuple.

    Raises:
        NestlingError: listing every field that cannot be.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    no_rope_layers: Sequence[int] | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, Sequence):
            several = tuple(dict.fromkeys(self.eos_token_id))
            one_or_none = several[0] if several else None
            object.__setattr__(self, "eos_token_id", several if len(several) > 1 else one_or_none)
        if self.no_rope_layers is not None:
            rotated = tuple(int(one) for one in self.no_rope_layers[: self.num_hidden_layers])
            is_stock = all(rotated) and len(rotated) == self.num_hidden_layers
            object.__setattr__(self, "no_rope_layers", None if is_stock else rotated)
        problems = [
            f"{name}={getattr(self, name)} must be at least 1"
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
            )
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name}={getattr(self, name)} is beyond {most}, which no model of this kind has"
            for name, most in _MOST.items()
            if getattr(self, name) > most
        ]
        problems += [
            f"{name}={getattr(self, name)} must be a number above 0"
            for name in ("rope_theta", "rms_norm_eps")
            if not 0 < getattr(self, name) < math.inf
        ]
        if self.no_rope_layers is not None and len(self.no_rope_layers) < self.num_hidden_layers:
            problems.append(
                f"no_rope_layers lists {len(self.no_rope_layers)} layers of "
                f"num_hidden_layers={self.num_hidden_layers}; give a number for each"
            )
        if not problems and self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
            if self.hidden_size % self.num_attention_heads:
                problems.append(
                    f"num_attention_heads={self.num_attention_heads} does not divide "
                    f"hidden_size={self.hidden_size}; choose one that does, or set head_dim"
                )
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if not problems and (self.head_dim < 2 or self.head_dim % 2):
            problems.append(f"head_dim={self.head_dim} must be even and at least 2")
        if problems:
            raise NestlingError("model: " + "; ".join(problems))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @property
    def first_eos_token_id(self) -> int | None:
        """The one that is named where there is room for one."""
        return next(iter(self.eos_token_ids), None)

    def rotates(self, layer: int) -> bool:
        """Return whether a layer's queries and keys are rotated by their positions."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads
