"""A uniform model as a GGUF file, the format of llama.cpp; `gguf` is imported only when one is written.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file holds weights and
shape, and no tokenizer: whoever opens it feeds token ids.

Llama's rotary positions are stored for neighbouring pairs there and for halves here, so that the rows of
each of its query and key heads are interleaved on the way; Qwen's are halves on both sides.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from models.config import ElasticConfig
from models.elastic import ElasticLM
from models.weights import EMBEDDING, HEAD, weights_of

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "Q8_0"}
"""Our names of dtypes -> those of the format; Q8_0 is 8 bits with a scale for every 32 numbers."""
Q8_BLOCK = 32

_ENDS = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
_PARTS = {
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


def write_gguf(model: ElasticLM, path: Path, *, dtype: str) -> Path:
    """Write the full model.

    Args:
        model: the model, its weights as they were loaded.
        path: the new file.
        dtype: of the matrices, a key of `DTYPES`; vectors stay in fp32.

    Returns:
        `path`.

    """
    import gguf

    config = model.config
    assert holds(config, dtype), (config, dtype)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    writer = gguf.GGUFWriter(path, _architecture(config))
    _write_shape(writer, config)
    for name, tensor in _tensors(model):
        array = tensor.float().contiguous().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def holds(config: ElasticConfig, dtype: str) -> bool:
    """Whether the format has this dtype at these widths: int8 comes in whole blocks."""
    widths = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim)
    return dtype != "int8" or all(width % Q8_BLOCK == 0 for width in widths)


def _architecture(config: ElasticConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias else "llama"


def _write_shape(writer: Any, config: ElasticConfig) -> None:
    writer.add_tokenizer_model("no_vocab")
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


def _tensors(model: ElasticLM) -> Iterator[tuple[str, Tensor]]:
    """Their name and the tensor, on the CPU; a tied head is left to the embedding."""
    interleaved = _architecture(model.config) == "llama"
    for name, tensor in weights_of(model).items():
        tensor = tensor.cpu()
        if name in _ENDS:
            yield _ENDS[name], tensor
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        if interleaved and part in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleave(tensor, model.config.head_dim)
        yield f"blk.{layer}.{_PARTS[part]}.{kind}", tensor


def interleave(weight_OI: Tensor, head_dim: int) -> Tensor:
    """Rows of each head, its two halves by turns.

    >>> import torch
    >>> interleave(torch.arange(8).reshape(8, 1), head_dim=4).flatten().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    heads = weight_OI.reshape(-1, 2, head_dim // 2, weight_OI.shape[1])
    return heads.transpose(1, 2).reshape(weight_OI.shape)
