"""A GGUF file of llama.cpp, opened: its shape, its weights dequantized, its tokenizer and chat template.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every quantization that the package `gguf`
dequantizes is read. Llama's rotary rows, which the file interleaves, are put back in halves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.base.errors import NestlingError
from models.base.files import naming
from models.checkpoint.gguf import ENDS, FREQUENCY_DIVISORS, OURS, PARTS, smollm3_layers
from models.checkpoint.gguf_file import naming_damage, open_gguf
from models.checkpoint.gguf_tokenizer import ENDS as END_KEYS
from models.checkpoint.gguf_vocabulary import read_tokenizer
from models.checkpoint.weights import HEAD
from models.elastic.config import ElasticConfig
from models.elastic.rope import rope_frequencies
from models.elastic.rope_scaling import RopeScaling, yarn_attention_factor
from models.kernels.blocks import KINDS, BlockTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
_CONTEXTS = [1024 * 2**power for power in range(8)]
"""Original contexts of models that were stretched as Llama 3 was."""
_NAMES = {theirs: ours for ours, theirs in ENDS.items()} | {
    f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in PARTS.items() for kind in ("weight", "bias")
}


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """The content of a GGUF file.

    Args:
        config: the shape.
        tensors: weights by Hugging Face name, dequantized or in the file's blocks.
        tokenizer: the same cuts as llama.cpp's; None where the file has none.
        chat_template: Jinja, if the file has one.
        quantizations: formats of the matrices, such as `Q4_1`; the most frequent first.
        granularity: the member that one of our own files holds.
    """

    config: ElasticConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    chat_template: str | None
    quantizations: tuple[str, ...]
    granularity: str | None
    in_blocks: bool
    """Whether the matrices are as the file has them."""


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """The tokenizer of a GGUF file."""

    tokenizer: Tokenizer | None
    eos_token: str | None
    """The text of the token that ends a text."""
    bos_token: str | None = None
    """The text of the token that begins one."""
    chat_template: str | None = None
    """Jinja, if the file has one."""


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as the format does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read_gguf_config(path: Path) -> ElasticConfig:
    """Read the shape alone.

    Raises:
        NestlingError: if the file is damaged, or of a kind that cannot be held.
    """
    with naming_damage(path):
        return _config(path, open_gguf(path))


def read_gguf_tokenizer(path: Path) -> GgufTokenizer:
    """Read the tokenizer alone.

    Raises:
        NestlingError: if the file is damaged, or its tokenizer of a kind that is not supported.
    """
    with naming_damage(path):
        keys = _keys(open_gguf(path))
        texts = keys.get("tokenizer.ggml.tokens") or []

        def token(role: str) -> str | None:
            number = keys.get(f"tokenizer.ggml.{role}_token_id")
            return texts[number] if number is not None and number < len(texts) else None

        return GgufTokenizer(
            tokenizer=read_tokenizer(path, keys),
            eos_token=token("eos"),
            bos_token=token("bos"),
            chat_template=_text("tokenizer.chat_template", keys),
        )


def read_gguf(path: Path, *, dtype: torch.dtype | None = None, in_blocks: bool = False) -> GgufModel:
    """Open a file.

    Args:
        path: the file.
        dtype: dtype of the tensors; None gives fp32, which holds every quantization exactly.
        in_blocks: keep matrices in the file's blocks where those of all layers are of `KINDS`. An embedding
            or head that is not becomes bf16 then, and vectors fp32.

    Raises:
        UsageError: if there is no file.
        NestlingError: naming what is damaged, or of a kind that cannot be held.
    """
    with naming_damage(path):
        return _read(path, open_gguf(path), dtype or torch.float32, in_blocks)


def _read(path: Path, reader: Any, dtype: torch.dtype, in_blocks: bool) -> GgufModel:
    keys = _keys(reader)
    config = _config(path, reader)
    in_blocks = in_blocks and all(
        tensor.tensor_type.name in KINDS for tensor in reader.tensors if _is_in_layer(tensor)
    )
    kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    return GgufModel(
        config=config,
        tensors=dict(_tensors(path, reader, config, None if in_blocks else dtype)),
        tokenizer=read_tokenizer(path, keys),
        chat_template=_text("tokenizer.chat_template", keys),
        quantizations=tuple(sorted(set(kinds), key=kinds.count, reverse=True)),
        granularity=keys.get(OURS),
        in_blocks=in_blocks,
    )


def _keys(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


class _Shape:
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

    def number(self, key: str, default: float | None = None) -> float:
        value = self(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise _damaged(f"{self.kind}.{key}", value, "a number")
        return float(value)

    def check(self, head_dim: int) -> None:
        """Raise NestlingError for what the elastic class does not compute."""
        if self.integer("rope.dimension_count", head_dim) != head_dim:
            raise NestlingError("it rotates a part of each head only (rope.dimension_count): take another")
        if self.integer("expert_count", 0):
            raise NestlingError("it is a mixture of experts; dense models are supported: take one")


def _text(key: str, keys: dict[str, Any]) -> str | None:
    value = keys.get(key)
    if value is not None and not isinstance(value, str):
        raise _damaged(key, value, "a text")
    return value or None


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int):
        raise _damaged(key, value, "a whole number")
    return value


def _damaged(key: str, value: Any, right: str) -> NestlingError:
    return NestlingError(f"{key}={str(value)[:50]!r} must be {right}; fetch the file again")


def _config(path: Path, reader: Any) -> ElasticConfig:
    with naming(path):
        return _read_shape(_Shape(reader), reader)


def _read_shape(shape: _Shape, reader: Any) -> ElasticConfig:
    embedding = shape.sizes.get("token_embd.weight")
    if embedding is None:
        raise NestlingError("it has no tensor token_embd.weight; fetch the file again")
    hidden, heads = shape.integer("embedding_length"), shape.integer("attention.head_count")
    if heads < 1:
        raise _damaged(f"{shape.kind}.attention.head_count", heads, "1 or more")
    head_dim = shape.integer("attention.key_length", hidden // heads)
    shape.check(head_dim)
    theta = shape.number("rope.freq_base", 10000.0)
    scaling = _scaling(shape, _factors(reader), theta, head_dim)
    num_layers = shape.integer("block_count")
    return ElasticConfig(
        vocab_size=embedding[1],
        hidden_size=hidden,
        intermediate_size=shape.integer("feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=shape.integer("attention.head_count_kv", heads),
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
    )


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
            return torch.from_numpy(np.array(_dequantized(tensor), dtype=np.float32))
    return None


def _scaling(shape: _Shape, factors_K: Tensor | None, theta: float, head_dim: int) -> RopeScaling | None:
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


def _is_in_layer(tensor: Any) -> bool:
    return len(tensor.shape) > 1 and tensor.name.startswith("blk.")


def _tensors(
    path: Path, reader: Any, config: ElasticConfig, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors in a dtype, or in blocks and otherwise in bf16."""
    interleaved = not (config.qk_norm or config.attention_bias)
    for tensor in reader.tensors:
        if tensor.name == FREQUENCY_DIVISORS:
            continue
        name = _name(path, tensor.name)
        weight = _in_blocks(tensor) if dtype is None else None
        if weight is None:
            vectors = torch.bfloat16 if len(tensor.shape) > 1 else torch.float32
            weight = torch.from_numpy(np.array(_dequantized(tensor))).to(dtype or vectors)
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = in_halves(weight, config.head_dim)
        yield name, weight


def _in_blocks(tensor: Any) -> Tensor | None:
    """Return a matrix that reads the mapped file; None for other formats."""
    size = KINDS.get(tensor.tensor_type.name)
    if size is None or len(tensor.shape) != 2:
        return None
    return BlockTensor(torch.from_numpy(tensor.data).unflatten(1, (-1, size)), tensor.tensor_type.name)


def _dequantized(tensor: Any) -> Any:
    import gguf

    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def _name(path: Path, theirs: str) -> str:
    if theirs in _NAMES:
        return _NAMES[theirs]
    block, _, rest = theirs.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or part not in _NAMES:
        raise NestlingError(
            f"{path} has the tensor {theirs}, which no supported architecture has: take another file"
        )
    return f"model.layers.{layer}.{_NAMES[part]}"


def in_halves(weight_OI: Tensor, head_dim: int) -> Tensor:
    """Return the rows of each head as two halves: the inverse of `models.checkpoint.gguf.interleave`.

    >>> from models.checkpoint.gguf import interleave
    >>> in_halves(interleave(torch.arange(8).reshape(8, 1), 4), 4).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    rows_HPK = torch.arange(len(weight_OI)).reshape(-1, head_dim // 2, 2)
    return weight_OI[rows_HPK.transpose(1, 2).flatten()]
