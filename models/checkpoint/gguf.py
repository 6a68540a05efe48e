"""A uniform model as a GGUF file, the format of llama.cpp; `gguf` is imported only when one is written.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file holds weights and shape,
and what `metadata` says: with the keys of `models.checkpoint.gguf_tokenizer` anyone can use it, without them
whoever opens it feeds token ids.

Llama's rotary positions are stored for neighbouring pairs there and for halves here, so that the rows of
each of its query and key heads are interleaved on the way; Qwen's are halves on both sides.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.base.errors import NestlingError
from models.checkpoint.weights import EMBEDDING, HEAD, weights_of
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.elastic.rope import rope_frequencies
from models.elastic.rope_scaling import RopeScaling, yarn_attention_factor

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "Q8_0"}
"""Our names of dtypes -> those of the format; Q8_0 is 8 bits with a scale for every 32 numbers."""
FILE_TYPES = {"fp32": "ALL_F32", "bf16": "MOSTLY_BF16", "fp16": "MOSTLY_F16", "int8": "MOSTLY_Q8_0"}
Q8_BLOCK = 32
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


def write_gguf(
    model: ElasticLM, path: Path, *, dtype: str, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write the full model.

    Args:
        model: the model, its weights as they were loaded.
        path: the new file.
        dtype: dtype of the matrices, a key of `DTYPES`; vectors stay in fp32.
        metadata: further keys of the file: texts, numbers that are not negative, truth values, lists.

    Returns:
        `path`.

    """
    import gguf

    config = model.config
    assert holds(config, dtype), (config, dtype)
    writer = gguf.GGUFWriter(path, _architecture(config))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_shape(writer, config)
    for key, value in (metadata or {TOKENIZER_MODEL: "no_vocab"}).items():
        _ADDERS[type(value)](writer, key, value)
    for name, array, kind in _arrays(model, dtype):
        writer.add_tensor(name, array, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        if error.errno is None:  # NumPy says how much was written, not why it was no more
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        writer.close()
    return path


def check_gguf(model: ElasticLM, path: Path, *, dtype: str, metadata: Mapping[str, Any]) -> int:
    """Read a file back and compare every tensor, bit for bit, and every key with what was to be written.

    Returns:
        The number of tensors.

    Raises:
        NestlingError: naming what differs.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(path)
    fields, tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
    wrong = [key for key, value in metadata.items() if key not in fields or fields[key].contents() != value]
    num_tensors = 0
    for name, array, kind in _arrays(model, dtype):
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


def holds(config: ElasticConfig, dtype: str) -> bool:
    """Return whether the format has this dtype at these widths: int8 comes in whole blocks."""
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    return dtype != "int8" or all(width % Q8_BLOCK == 0 for width in widths)


def _architecture(config: ElasticConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias else "llama"


def _write_shape(writer: Any, config: ElasticConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
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


def _arrays(model: ElasticLM, dtype: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield names, numbers as they stand in the file, and their type there."""
    import gguf

    matrix, vector = gguf.GGMLQuantizationType[DTYPES[dtype]], gguf.GGMLQuantizationType.F32
    for name, tensor in _tensors(model):
        kind = vector if tensor.ndim == 1 else matrix
        yield name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), kind


def _tensors(model: ElasticLM) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, on the CPU; a tied head is left to the embedding."""
    config = model.config
    interleaved = _architecture(config) == "llama"
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        stretched_K = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        yield FREQUENCY_DIVISORS, rope_frequencies(config.head_dim, config.rope_theta) / stretched_K
    for name, tensor in weights_of(model).items():
        tensor = tensor.cpu()
        if name in ENDS:
            yield ENDS[name], tensor
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        if interleaved and part in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleave(tensor, config.head_dim)
        yield f"blk.{layer}.{PARTS[part]}.{kind}", tensor


def interleave(weight_OI: Tensor, head_dim: int) -> Tensor:
    """Return the rows of each head with its two halves interleaved.

    >>> import torch
    >>> interleave(torch.arange(8).reshape(8, 1), head_dim=4).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = weight_OI.reshape(-1, 2, head_dim // 2, weight_OI.shape[1])
    return heads.transpose(1, 2).reshape(weight_OI.shape)
