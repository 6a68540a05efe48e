"""A GGUF file of llama.cpp, opened: its shape, its weights dequantized, its tokenizer and chat template.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every quantization that the package `gguf`
dequantizes is read. Llama's rotary rows, which the file interleaves, are put back in halves.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.base.errors import NestlingError
from models.base.files import naming
from models.checkpoint.gguf import ENDS, FREQUENCY_DIVISORS, FUSED, OURS, PARTS
from models.checkpoint.gguf_file import naming_damage, open_gguf
from models.checkpoint.gguf_shape import GgufShape, dequantized, read_shape, text_of
from models.checkpoint.gguf_vocabulary import read_tokenizer
from models.checkpoint.layout import pad
from models.elastic.config import ElasticConfig
from models.kernels.blocks import KINDS, BlockTensor

_NAMES = {theirs: ours for ours, theirs in ENDS.items()} | {
    f"{theirs}.{kind}": f"{ours}.{kind}" for ours, theirs in PARTS.items() for kind in ("weight", "bias")
}
_NAMES_OF_GEMMA3 = _NAMES | {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_FUSED = re.compile(r"blk\.(\d{1,5})\.attn_qkv\.weight")
"""Queries, keys and values as one matrix, as openelm has them."""


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
    is_equal: bool
    """Whether all layers have the same widths; unequal ones are filled up with zeros."""


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
        return _shape(path, open_gguf(path)).config


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
            chat_template=text_of("tokenizer.chat_template", keys),
        )


def read_gguf(
    path: Path, *, dtype: torch.dtype | None = None, in_blocks: bool = False, mapped: bool = False
) -> GgufModel:
    """Open a file.

    Args:
        path: the file.
        dtype: dtype of the tensors; None gives fp32, which holds every quantization exactly.
        in_blocks: keep matrices in the file's blocks where those of all layers are of `KINDS`. An embedding
            or head that is not becomes bf16 then, and vectors fp32.
        mapped: leave fp32 numbers where the file is mapped; nobody may change them.

    Raises:
        UsageError: if there is no file.
        NestlingError: naming what is damaged, or of a kind that cannot be held.
    """
    with naming_damage(path):
        return _read(path, open_gguf(path), dtype or torch.float32, in_blocks, mapped)


def _read(path: Path, reader: Any, dtype: torch.dtype, in_blocks: bool, mapped: bool) -> GgufModel:
    keys = _keys(reader)
    shape = _shape(path, reader)
    in_blocks = (in_blocks and shape.is_equal) and all(
        tensor.tensor_type.name in KINDS and not _FUSED.fullmatch(tensor.name)
        for tensor in reader.tensors
        if _is_in_layer(tensor)
    )
    kinds = [tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1]
    tensors = dict(_tensors(path, reader, shape, None if in_blocks else dtype, mapped))
    return GgufModel(
        config=shape.config,
        tensors=tensors if shape.is_equal else pad(tensors, shape.config),
        tokenizer=read_tokenizer(path, keys),
        chat_template=text_of("tokenizer.chat_template", keys),
        quantizations=tuple(sorted(set(kinds), key=kinds.count, reverse=True)),
        granularity=keys.get(OURS),
        in_blocks=in_blocks,
        is_equal=shape.is_equal,
    )


def _shape(path: Path, reader: Any) -> GgufShape:
    with naming(path):
        return read_shape(reader)


def _keys(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _is_in_layer(tensor: Any) -> bool:
    return len(tensor.shape) > 1 and tensor.name.startswith("blk.")


def _tensors(
    path: Path, reader: Any, shape: GgufShape, dtype: torch.dtype | None, mapped: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors in a dtype, or in blocks and otherwise in bf16."""
    config = shape.config
    interleaved = not (config.qk_norm or config.attention_bias)
    names = _NAMES_OF_GEMMA3 if config.post_norms else _NAMES
    for tensor in reader.tensors:
        if tensor.name == FREQUENCY_DIVISORS:
            continue
        weight = _in_blocks(tensor) if dtype is None else None
        if weight is None:
            vectors = torch.bfloat16 if len(tensor.shape) > 1 else torch.float32
            numbers = dequantized(tensor)
            has_gains = config.norm_offset and tensor.name.endswith("norm.weight")
            if has_gains or (not mapped and np.may_share_memory(numbers, tensor.data)):
                numbers = np.array(numbers)
            if has_gains:
                numbers -= 1  # the file has the gains themselves
            weight = torch.from_numpy(numbers).to(dtype or vectors)
        if (fused := _FUSED.fullmatch(tensor.name)) and int(fused[1]) < config.num_hidden_layers:
            parts = weight.split(shape.rows(int(fused[1])))
            yield from zip((f"model.layers.{fused[1]}.{part}.weight" for part in FUSED), parts, strict=True)
            continue
        name = _name(path, tensor.name, names)
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = in_halves(weight, config.head_dim)
        yield name, weight


def _in_blocks(tensor: Any) -> Tensor | None:
    """Return a matrix that reads the mapped file; None for other formats."""
    size = KINDS.get(tensor.tensor_type.name)
    if size is None or len(tensor.shape) != 2:
        return None
    return BlockTensor(torch.from_numpy(tensor.data).unflatten(1, (-1, size)), tensor.tensor_type.name)


def _name(path: Path, theirs: str, names: Mapping[str, str]) -> str:
    if theirs in names:
        return names[theirs]
    block, _, rest = theirs.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or part not in names:
        raise NestlingError(
            f"{path} has the tensor {theirs}, which no supported architecture has: take another file"
        )
    return f"model.layers.{layer}.{names[part]}"


def in_halves(weight_OI: Tensor, head_dim: int) -> Tensor:
    """Return the rows of each head as two halves: the inverse of `models.checkpoint.gguf.interleave`.

    >>> from models.checkpoint.gguf import interleave
    >>> in_halves(interleave(torch.arange(8).reshape(8, 1), 4), 4).flatten().tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    rows_HPK = torch.arange(len(weight_OI)).reshape(-1, head_dim // 2, 2)
    return weight_OI[rows_HPK.transpose(1, 2).flatten()]
