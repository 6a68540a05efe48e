"""A model or a member as a GGUF file, the format of llama.cpp; `gguf` is imported only when one is written.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file holds weights and shape,
and what `metadata` says: with the keys of `models.checkpoint.gguf_tokenizer` anyone can use it, without them
whoever opens it feeds token ids.

Llama's rotary positions are stored for neighbouring pairs there and for halves here, so that the rows of
each of its query and key heads are interleaved on the way; Qwen's are halves on both sides.
"""

import errno
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.base.mapped import read_pages
from models.checkpoint.weights import EMBEDDING, HEAD
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Plan
from models.elastic.rope import rope_frequencies
from models.elastic.rope_scaling import RopeScaling, yarn_attention_factor
from models.elastic.view import Model, View, widest

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
"""Our names of dtypes -> those of the format; of Q8_0 and Q4_0 every 32 numbers have a scale."""
SPELLINGS = {"f32": "fp32", "f16": "fp16", "q8_0": "int8", "q4_0": "int4"}
"""Names that people know from llama.cpp."""
FILE_TYPES = {
    "fp32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "fp16": "MOSTLY_F16",
    "int8": "MOSTLY_Q8_0",
    "int4": "MOSTLY_Q4_0",
}
BLOCKS, BLOCK = ("int8", "int4"), 32
FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
INTERLEAVED = ("llama", "deci", "smollm3")
FREQUENCY_DIVISORS = "rope_freqs.weight"
"""The tensor by which each rotary frequency is divided (Llama 3)."""
TOKENIZER_MODEL = "tokenizer.ggml.model"
OURS = "nestling.granularity"
"""The key of the granularity that a file was extracted as."""

_ADDERS = {
    str: lambda writer, key, value: writer.add_string(key, value),
    bool: lambda writer, key, value: writer.add_bool(key, value),
    int: lambda writer, key, value: writer.add_uint32(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}
ENDS = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Model, path: Path, *, dtype: str, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a model or a member of one, a tensor at a time.

    Args:
        model: the model, its weights as they were loaded.
        path: the new file.
        dtype: dtype of the matrices, a key of `DTYPES`; vectors stay in fp32.
        metadata: further keys of the file: texts, numbers that are not negative, truth values, lists.

    Returns:
        `path`.

    Raises:
        UsageError: if its layers are unequal, and of a kind of which llama.cpp holds equal ones only.
    """
    import gguf

    view = _view(model)
    config = widest(view.model.config, view.plan)
    assert holds(view.model.config, dtype, view.plan), (config, dtype)
    writer = gguf.GGUFWriter(path, architecture_of(view))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_shape(writer, config, view.plan)
    for key, value in (metadata or {TOKENIZER_MODEL: "no_vocab"}).items():
        _ADDERS[type(value)](writer, key, value)
    try:
        for name, tensor in _tensors(view):
            kind = _kind(name, tensor, dtype)
            bytes_ = math.prod(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind))
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), bytes_, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array, _ in _arrays(view, dtype):
            writer.write_tensor_data(array)
    except OSError as error:
        if error.errno is None:  # NumPy says how much was written, not why it was no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        writer.close()
    return path


def count_file_bytes(model: Model, dtype: str) -> int:
    """Return the bytes of the tensors of a file, which are nearly all of it."""
    import gguf

    shapes = ((tuple(tensor.shape), _kind(name, tensor, dtype)) for name, tensor in _tensors(_view(model)))
    return sum(math.prod(gguf.quant_shape_to_byte_shape(shape, kind)) for shape, kind in shapes)


def check_gguf(model: Model, path: Path, *, dtype: str, metadata: Mapping[str, Any]) -> int:
    """Read a file back and compare every tensor, bit for bit, and every key with what was to be written.

    Returns:
        The number of tensors.

    Raises:
        NestlingError: naming what differs.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    fields, tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
    wrong = [key for key, value in metadata.items() if key not in fields or fields[key].contents() != value]
    num_tensors = 0
    for name, array, kind in _arrays(_view(model), dtype):
        num_tensors += 1
        found = tensors.get(name)
        if found is None or found.tensor_type != kind or not np.array_equal(found.data, array):
            wrong.append(name)
    if wrong or num_tensors != len(tensors):
        raise NestlingError(f"{path} reads back otherwise ({', '.join(wrong[:3])}); please report this")
    return num_tensors


def is_ours(path: Path) -> bool:
    """Return whether a file is a GGUF file with the key `OURS`."""
    import gguf

    try:
        return OURS in gguf.GGUFReader(path).fields
    except (ValueError, IndexError, OverflowError):  # not the format, or damaged
        return False


def holds(config: ElasticConfig, dtype: str, plan: Plan | None = None) -> bool:
    """Return whether the format has this dtype at these widths: int8 and int4 come in whole blocks."""
    layers = (FULL.resolve(config) if plan is None else plan).layers
    wide = config.heads_per_group * config.head_dim
    widths = {
        config.hidden_size,
        *(layer.ffn for layer in layers),
        *(layer.groups * wide for layer in layers),
    }
    return dtype not in BLOCKS or all(width % BLOCK == 0 for width in widths)


def architecture_of(model: Model) -> str:
    """Return llama.cpp's name of the architecture that a file is written as.

    Most of its architectures size every layer as the first one.

    Raises:
        UsageError: if none of them computes the same, or layers are unequal and none sizes each by itself.
    """
    view = _view(model)
    config, plan = view.model.config, view.plan
    shape = widest(config, plan)
    if config.post_norms:
        raise UsageError("GGUF files of Gemma 3 are read, and not written; take --format hf")
    if shape.no_rope_layers is not None:
        return _smollm3(shape, plan)
    if plan.is_uniform:
        return "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    if config.qk_norm and config.tie_word_embeddings and config.rope_scaling is None:
        return "openelm"
    if config.qk_norm or config.attention_bias:
        kind = (
            "biases" if config.attention_bias else "norms of heads, and a head of its own or scaled positions"
        )
        raise UsageError(
            f"llama.cpp holds no unequal layers with {kind}; give all layers one fraction of each axis, "
            "or take --format hf"
        )
    return "deci"


def _view(model: Model) -> View:
    return model if isinstance(model, View) else View(model, FULL)


def _smollm3(shape: ElasticConfig, plan: Plan) -> str:
    """Return the architecture of layers without positions, of which the file does not say which they are."""
    is_llama3 = shape.rope_scaling is not None and shape.rope_scaling.rope_type == "llama3"
    held = plan.is_uniform and not (shape.qk_norm or shape.attention_bias or is_llama3)
    if not held or shape.no_rope_layers != smollm3_layers(shape.num_hidden_layers):
        raise UsageError(
            "llama.cpp holds layers without RoPE (no_rope_layers) only if every fourth has none, layers are "
            "equal, and positions are not stretched as Llama 3's; keep all layers and one fraction of each "
            "axis, or take --format hf"
        )
    return "smollm3"


def smollm3_layers(num_layers: int) -> tuple[int, ...]:
    """Return `no_rope_layers` as llama.cpp has them.

    >>> smollm3_layers(5)
    (1, 1, 1, 0, 1)
    """
    return tuple(int((layer + 1) % 4 != 0) for layer in range(num_layers))


def _write_shape(writer: Any, config: ElasticConfig, plan: Plan) -> None:
    groups = [layer.groups for layer in plan.layers]
    per_layer = {
        "feed_forward_length": [layer.ffn for layer in plan.layers],
        "head_count": [count * config.heads_per_group for count in groups],
        "head_count_kv": groups,
    }
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    for name, values in per_layer.items():
        getattr(writer, f"add_{name}")(values[0] if plan.is_uniform else values)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_scaling is not None:
        _write_rope_scaling(writer, config.rope_scaling)


def _write_rope_scaling(writer: Any, scaling: RopeScaling) -> None:
    """Write the settings; of Llama 3's the file keeps a tensor of divisors instead, see `_arrays`."""
    import gguf

    if scaling.rope_type == "llama3":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        # llama.cpp multiplies by the paper's own factor as well
        own = yarn_attention_factor(scaling.factor)
        writer.add_rope_scaling_yarn_attn_factor(scaling.attention_factor / own)


def _arrays(view: View, dtype: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield names, numbers as they stand in the file, and their type there."""
    import gguf

    for name, tensor in _tensors(view):
        kind = _kind(name, tensor, dtype)
        read_pages(tensor)
        yield name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), kind


def _kind(name: str, tensor: Tensor, dtype: str) -> Any:
    """Return the type of a tensor: vectors stay in fp32, and the vocabulary's matrices never have 4 bits."""
    import gguf

    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    is_end = name in ENDS.values()
    return gguf.GGMLQuantizationType[DTYPES["int8" if is_end and dtype == "int4" else dtype]]


def _tensors(view: View) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, on the CPU; a tied head is left to the embedding."""
    config = view.model.config
    kind = architecture_of(view)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        stretched_K = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield FREQUENCY_DIVISORS, rope_frequencies(config.head_dim, config.rope_theta) / stretched_K
    tensors = {name: tensor.detach() for name, tensor in view.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    for name, tensor in tensors.items():
        if name in ENDS:
            yield ENDS[name], tensor.cpu()
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, suffix = rest.rpartition(".")
        if kind == "openelm" and part in FUSED:
            if part == FUSED[0]:  # q, k and v are one matrix there
                rows = [tensors[f"model.layers.{layer}.{one}.{suffix}"].cpu() for one in FUSED]
                yield f"blk.{layer}.attn_qkv.{suffix}", torch.cat(rows)
            continue
        if kind in INTERLEAVED and part in FUSED[:2]:
            tensor = interleave(tensor, config.head_dim)
        yield f"blk.{layer}.{PARTS[part]}.{suffix}", tensor.cpu()


def interleave(weight_OI: Tensor, head_dim: int) -> Tensor:
    """Return the rows of each head with its two halves interleaved.

    >>> import torch
    >>> interleave(torch.arange(8).reshape(8, 1), head_dim=4).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = weight_OI.reshape(-1, 2, head_dim // 2, weight_OI.shape[1])
    return heads.transpose(1, 2).reshape(weight_OI.shape)
