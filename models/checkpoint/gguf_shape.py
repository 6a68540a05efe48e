"""The shape that a GGUF file states, in keys below the name of its architecture.

Most architectures of llama.cpp size every layer as the first one. `deci` and `openelm` have lists of widths:
such a file opens filled up with zeros to its widest layer, as models/checkpoint/layout.py pads.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.checkpoint.gemma3 import STYLE, layer_types_of
from models.checkpoint.gguf import ENDS, FREQUENCY_DIVISORS, smollm3_layers
from models.checkpoint.gguf_tokenizer import ENDS as END_KEYS
from models.checkpoint.weights import HEAD
from models.elastic.config import ElasticConfig
from models.elastic.rope import rope_frequencies
from models.elastic.rope_scaling import RopeScaling, yarn_attention_factor

UNEQUAL = ("deci", "openelm")
"""Architectures that size each layer by itself."""
GEMMA3 = "gemma3"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", GEMMA3, *UNEQUAL)
_LAYERS_OF_27B = 62
MOST_LAYERS = 2**14
_CONTEXTS = [1024 * 2**power for power in range(8)]
"""Original contexts of models that were stretched as Llama 3 was."""


@dataclass(frozen=True, kw_only=True)
class GgufShape:
    """The shape of a file.

    Args:
        config: the shape, each width that of the widest layer.
        groups: key/value heads of each layer.
        is_equal: whether all layers have the same widths.
    """

    config: ElasticConfig
    groups: tuple[int, ...]
    is_equal: bool

    def rows(self, layer: int) -> list[int]:
        """Return the rows of a layer's queries, keys and values."""
        kv = self.groups[layer] * self.config.head_dim
        return [self.config.heads_per_group * kv, kv, kv]


def read_shape(reader: Any) -> GgufShape:
    """Return the shape that an open file states.

    Raises:
        NestlingError: if it is damaged, or of a kind that cannot be held.
    """
    return _read_shape(_Keys(reader), reader)


def dequantized(tensor: Any) -> Any:
    """Return the numbers of a tensor of a reader."""
    import gguf

    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


class _Keys:
    """Keys of a file below the name of its architecture."""

    def __init__(self, reader: Any) -> None:
        self.fields = reader.fields
        self.sizes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
        self.kind = self.of("general.architecture")
        if self.kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise NestlingError(
                f"it holds the architecture {self.kind!r}; {known} are supported: take another"
            )

    def of(self, key: str, default: Any = None) -> Any:
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise NestlingError(f"it has no {key}, which the shape needs; fetch the file again")
        return default

    def __call__(self, key: str, default: Any = None) -> Any:
        return self.of(f"{self.kind}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self(key, default)
        if isinstance(value, list):
            raise NestlingError(
                f"{key} differs between layers; only equal layers are supported: take another"
            )
        return _whole(f"{self.kind}.{key}", value)

    def each(self, key: str, num_layers: int, default: list[int] | None = None) -> list[int]:
        """Return a width of each layer, where the architecture has lists of them."""
        value = self(key, default)
        if not isinstance(value, list) or self.kind not in UNEQUAL:
            return [self.integer(key, default[0] if default else None)] * num_layers
        name = f"{self.kind}.{key}"
        if len(value) != num_layers:
            raise damaged(name, value, f"{num_layers} numbers, one for each layer")
        return [_whole(name, one) for one in value]

    def number(self, key: str, default: float | None = None) -> float:
        value = self(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise damaged(f"{self.kind}.{key}", value, "a number")
        return float(value)

    def check(self, head_dim: int) -> None:
        """Raise NestlingError for what the elastic class does not compute."""
        if self.integer("rope.dimension_count", head_dim) != head_dim:
            raise NestlingError("it rotates a part of each head only (rope.dimension_count): take another")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self.number(name, 0.0):
                raise NestlingError(f"it caps logits ({name}), which is not supported: take another")
        if self.integer("expert_count", 0):
            raise NestlingError("it is a mixture of experts; dense models are supported: take one")


def text_of(key: str, keys: dict[str, Any]) -> str | None:
    """Return a text of the file, or None."""
    value = keys.get(key)
    if value is not None and not isinstance(value, str):
        raise damaged(key, value, "a text")
    return value or None


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int):
        raise damaged(key, value, "a whole number")
    return value


def damaged(key: str, value: Any, right: str) -> NestlingError:
    """Return an error about the value of a key."""
    return NestlingError(f"{key}={str(value)[:50]!r} must be {right}; fetch the file again")


def _read_shape(shape: _Keys, reader: Any) -> GgufShape:
    embedding = shape.sizes.get("token_embd.weight")
    if embedding is None:
        raise NestlingError("it has no tensor token_embd.weight; fetch the file again")
    num_layers, hidden = shape.integer("block_count"), shape.integer("embedding_length")
    if not 1 <= num_layers <= MOST_LAYERS:
        raise damaged(f"{shape.kind}.block_count", num_layers, f"1 to {MOST_LAYERS}")
    heads, groups, ffn = _widths(shape, num_layers)
    head_dim = shape.integer("attention.key_length", hidden // heads[0])
    shape.check(head_dim)
    theta = shape.number("rope.freq_base", 10000.0)
    scaling = _scaling(shape, _factors(reader), theta, head_dim)
    config = ElasticConfig(
        vocab_size=embedding[1],
        hidden_size=hidden,
        intermediate_size=max(ffn),
        num_hidden_layers=num_layers,
        num_attention_heads=max(heads),
        num_key_value_heads=max(groups),
        head_dim=head_dim,
        max_position_embeddings=shape.integer("context_length"),
        rope_theta=theta,
        rope_scaling=scaling,
        no_rope_layers=smollm3_layers(num_layers) if shape.kind == "smollm3" else None,
        # The file keeps fp32; the configuration that was converted had a short decimal.
        rms_norm_eps=_short(shape.number("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings=ENDS[HEAD] not in shape.sizes,
        attention_bias="blk.0.attn_q.bias" in shape.sizes,
        qk_norm="blk.0.attn_q_norm.weight" in shape.sizes,
        bos_token_id=_token(shape.fields, "bos"),
        eos_token_id=_ends(shape.fields),
        **(_of_gemma3(shape, num_layers, hidden / heads[0]) if shape.kind == GEMMA3 else {}),
    )
    is_equal = all(len({*widths}) == 1 for widths in (heads, groups, ffn))
    return GgufShape(config=config, groups=tuple(groups), is_equal=is_equal)


def _of_gemma3(shape: _Keys, num_layers: int, queries_of_27b: float) -> dict[str, Any]:
    """Return what Gemma 3 has besides; what no key says is as in llama.cpp."""
    pattern = shape.integer("attention.sliding_window_pattern", 6)
    if pattern < 1:
        raise damaged(f"{shape.kind}.attention.sliding_window_pattern", pattern, "at least 1")
    return {
        **{name: value for name, value in STYLE.items() if name != "qk_norm"},
        "layer_types": layer_types_of({}, num_layers, pattern),
        "sliding_window": shape.integer("attention.sliding_window"),
        "rope_local_base_freq": shape.number("rope.freq_base_swa", 1e4),
        "query_pre_attn_scalar": queries_of_27b if num_layers == _LAYERS_OF_27B else 0.0,
    }


def _widths(shape: _Keys, num_layers: int) -> tuple[list[int], list[int], list[int]]:
    """Return heads, key/value heads and neurons of each layer."""
    heads = shape.each("attention.head_count", num_layers)
    if min(heads) < 1:
        raise damaged(f"{shape.kind}.attention.head_count", min(heads), "1 or more in each layer")
    groups = shape.each("attention.head_count_kv", num_layers, heads)
    ffn = shape.each("feed_forward_length", num_layers)
    if len({*heads}) == len({*groups}) == len({*ffn}) == 1:
        return heads, groups, ffn
    if min(*groups, *ffn) < 1 or len({one / group for one, group in zip(heads, groups, strict=True)}) > 1:
        raise NestlingError(
            f"it is a {shape.kind} model whose layers lack a part, or have other numbers of query heads to a "
            "key/value head; only layers of other widths are supported: take another, or the folder that it "
            "was made from"
        )
    return heads, groups, ffn


def _short(number: float) -> float:
    """Return the shortest decimal that rounds to this fp32.

    >>> _short(9.999999747378752e-06)
    1e-05
    """
    return float(str(np.float32(number)))


def _ends(fields: Any) -> tuple[int, ...]:
    """Return every token that ends a text, or a turn of a conversation."""
    keys = (f"tokenizer.ggml.{end}" for end in END_KEYS)
    return tuple(_whole(key, fields[key].contents()) for key in keys if key in fields)


def _token(fields: Any, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    return _whole(key, fields[key].contents()) if key in fields else None


def _factors(reader: Any) -> Tensor | None:
    """Return what each rotary frequency is divided by, where the file says it (Llama 3)."""
    for tensor in reader.tensors:
        if tensor.name == FREQUENCY_DIVISORS:
            return torch.from_numpy(np.array(dequantized(tensor), dtype=np.float32))
    return None


def _scaling(shape: _Keys, factors_K: Tensor | None, theta: float, head_dim: int) -> RopeScaling | None:
    if factors_K is not None:
        return _llama3(factors_K, theta, head_dim)
    rule, factor = shape("rope.scaling.type", "none"), shape.number("rope.scaling.factor", 1.0)
    attention = shape.number("rope.scaling.yarn_attn_factor", shape.number("rope.scaling.attn_factor", 1.0))
    match rule:
        case "none":
            return None
        case "linear":
            return RopeScaling(rope_type="linear", factor=factor)
        case "yarn":
            return RopeScaling(
                rope_type="yarn",
                factor=factor,
                original_max_position_embeddings=shape.integer("rope.scaling.original_context_length"),
                beta_fast=shape.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=shape.number("rope.scaling.yarn_beta_slow", 1.0),
                attention_factor=attention * yarn_attention_factor(factor),
            )
    raise NestlingError(f"positions are stretched by {rule!r}; linear, yarn and Llama 3's are supported")


def _llama3(factors_K: Tensor, theta: float, head_dim: int) -> RopeScaling:
    """Return the settings of which the file keeps only the divisors of the frequencies that they lead to."""
    found_K = rope_frequencies(head_dim, theta) / factors_K
    for original in _CONTEXTS:
        scaling = RopeScaling(
            rope_type="llama3", factor=float(factors_K.max()), original_max_position_embeddings=original
        )
        if torch.allclose(rope_frequencies(head_dim, theta, scaling), found_K, rtol=1e-5):
            return scaling
    raise NestlingError(f"{FREQUENCY_DIVISORS} divides rotary frequencies in a way that is not Llama 3's")
