"""The shape of an elastic model, in Hugging Face's field names.

One class covers Llama, Mistral, Qwen2 (`attention_bias`), Qwen3 (`qk_norm`), SmolLM3 (`no_rope_layers`) and
the text models of Gemma 3 (`layer_types` to `scale_embeddings`); models/checkpoint/huggingface.py maps to and
from their configurations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from models.base.errors import NestlingError
from models.elastic.rope_scaling import RopeScaling

SLIDING, WHOLE = "sliding_attention", "full_attention"
"""Hugging Face's kinds of layers: those that read a window of positions, and those that read all."""
HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
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
        layer_types: for each layer `full_attention`, or `sliding_attention` if it reads a window of the last
            positions alone; None has no window anywhere.
        sliding_window: the positions that such a layer reads, the new one among them; 0 without one.
        rope_local_base_freq: base of the rotary frequencies of such a layer, which nothing stretches; 0
            without one.
        query_pre_attn_scalar: scores of attention are divided by its root; 0 means `head_dim`.
        hidden_act: what the gates of the feed-forward part go through.
        post_norms: RMSNorm of what attention and the feed-forward part add to the residual stream, too.
        norm_offset: the gains of every RMSNorm are 1 more than what is stored.
        scale_embeddings: embeddings are multiplied by the root of `hidden_size`.
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
    layer_types: Sequence[str] | None = None
    sliding_window: int = 0
    rope_local_base_freq: float = 0.0
    query_pre_attn_scalar: float = 0.0
    hidden_act: HiddenAct = "silu"
    post_norms: bool = False
    norm_offset: bool = False
    scale_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._settle_lists()
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
        problems += self._problems_of_windows()
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

    def _settle_lists(self) -> None:
        """Keep lists as tuples of a value for each layer, and None for those that say nothing."""
        if isinstance(self.eos_token_id, Sequence):
            several = tuple(dict.fromkeys(self.eos_token_id))
            one_or_none = several[0] if several else None
            object.__setattr__(self, "eos_token_id", several if len(several) > 1 else one_or_none)
        if self.no_rope_layers is not None:
            rotated = tuple(int(one) for one in self.no_rope_layers[: self.num_hidden_layers])
            is_stock = all(rotated) and len(rotated) == self.num_hidden_layers
            object.__setattr__(self, "no_rope_layers", None if is_stock else rotated)
        if self.layer_types is not None:
            kinds = tuple(self.layer_types[: self.num_hidden_layers])
            is_whole = len(kinds) == self.num_hidden_layers and set(kinds) == {WHOLE}
            object.__setattr__(self, "layer_types", None if is_whole else kinds)
        if self.layer_types is None:
            object.__setattr__(self, "sliding_window", 0)
            object.__setattr__(self, "rope_local_base_freq", 0.0)

    def _problems_of_windows(self) -> list[str]:
        """Return what cannot be of the kinds of layers, and of what Gemma has besides."""
        problems = []
        kinds = self.layer_types
        if kinds is not None and len(kinds) < self.num_hidden_layers:
            problems.append(
                f"layer_types lists {len(kinds)} layers of num_hidden_layers={self.num_hidden_layers}; "
                "give a kind for each"
            )
        if kinds is not None and not {*kinds} <= {SLIDING, WHOLE}:
            other = next(kind for kind in kinds if kind not in (SLIDING, WHOLE))
            problems.append(f"layer_types has {other!r}; {SLIDING} and {WHOLE} are supported")
        if kinds is not None and (self.sliding_window < 1 or not 0 < self.rope_local_base_freq < math.inf):
            problems.append(
                f"sliding_window={self.sliding_window} and rope_local_base_freq={self.rope_local_base_freq} "
                f"must be above 0 where layer_types has {SLIDING}"
            )
        if not 0 <= self.query_pre_attn_scalar < math.inf:
            problems.append(f"query_pre_attn_scalar={self.query_pre_attn_scalar} must be a number above 0")
        if self.hidden_act not in get_args(HiddenAct):
            problems.append(f"hidden_act={self.hidden_act!r} is not one of {', '.join(get_args(HiddenAct))}")
        return problems

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

    def window(self, layer: int) -> int | None:
        """Return how many of the last positions a layer reads, the new one among them; None for all."""
        is_local = self.layer_types is not None and self.layer_types[layer] == SLIDING
        return self.sliding_window if is_local else None

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads


def window_blocks(num_new: int, num_read: int, window: int) -> list[tuple[int, int, int]]:
    """Return where the positions start and end that blocks of new ones read, and how many these are.

    A block has at most as many as a window, so that long texts take time by their length, not its square.

    >>> window_blocks(5, 7, 4)
    [(0, 6, 4), (3, 7, 1)]
    """
    firsts = range(num_read - num_new, num_read, window)
    ends = [min(first + window, num_read) for first in firsts]
    return [(max(0, first - window + 1), end, end - first) for first, end in zip(firsts, ends, strict=True)]
