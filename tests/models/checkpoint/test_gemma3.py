"""Text models of Gemma 3: what is read of their files, and what is refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma3ForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from models.base.errors import NestlingError, UsageError
from models.checkpoint.extract import extract
from models.checkpoint.folder import load_model, save_model
from models.checkpoint.gemma3 import STYLE
from models.checkpoint.gguf import write_gguf
from models.checkpoint.huggingface import config_from_hugging_face, config_to_hugging_face, to_hugging_face
from models.elastic.config import SLIDING, WHOLE, ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.rope_scaling import RopeScaling

GEMMA3: dict[str, Any] = {
    **STYLE,
    "layer_types": (SLIDING, WHOLE, SLIDING, SLIDING),
    "sliding_window": 5,
    "rope_local_base_freq": 100.0,
}
"""The fields of a tiny model of four layers, whose window is shorter than any text."""
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FIELDS: dict[str, Any] = {"model_type": "gemma3_text", **SIZES}
SUM_ORDER = 1e-5
"""fp32 logits relative to the largest: sums are added in another order."""


def make_model(**fields: Any) -> ElasticLM:
    model = ElasticLM(ElasticConfig(**(SIZES | GEMMA3 | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def test_positions_of_the_larger_models_are_read_in_each_spelling() -> None:
    stretched = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": stretched}
    near = {"rope_type": "default", "rope_theta": 2e4}
    new = {"rope_parameters": {WHOLE: {**stretched, "rope_theta": 1e6}, SLIDING: near}}
    ours = config_from_hugging_face(FIELDS | old)
    assert ours == config_from_hugging_face(FIELDS | new)
    assert ours.rope_scaling == RopeScaling(rope_type="linear", factor=8.0)
    assert (ours.rope_theta, ours.rope_local_base_freq, ours.sliding_window) == (1e6, 2e4, 4096)
    for fields in (old, new):
        theirs = AutoConfig.for_model(**FIELDS, **fields).to_dict()
        assert config_from_hugging_face(theirs) == ours


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'"),
        ({"layer_types": [SLIDING]}, "layer_types lists 1 layers of"),
        ({"layer_types": "sliding"}, "layer_types='sliding'"),
        ({"sliding_window": None}, "sliding_window=0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters="),
        ({"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "rope_type='linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "architectures="),
        ({"model_type": "gemma2"}, "model_type='gemma2'.*gemma3_text are"),
        ({"model_type": "gemma3"}, "model_type='gemma3'.*gemma3_text are; it reads images"),
    ],
)
def test_what_is_not_computed_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(NestlingError, match=named) as caught:
        config_from_hugging_face(FIELDS | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part",
    [
        {"post_norms": True},
        {**GEMMA3, "qk_norm": False},
        {**GEMMA3, "attention_bias": True},
        {"query_pre_attn_scalar": 9.0},
    ],
)
def test_a_part_of_it_has_no_stock_architecture(part: dict[str, Any]) -> None:
    with pytest.raises(NestlingError, match="no stock architecture"):
        config_to_hugging_face(ElasticConfig(**SIZES, **part))


def test_what_transformers_refuses_is_named_before_anything_is_written(tmp_path: Path) -> None:
    folder = load_model(save_model(tmp_path / "model", make_model(num_key_value_heads=4)))
    with pytest.raises(NestlingError, match="num_attention_heads=3, which do not divide hidden_size=32"):
        extract(folder, Granularity.parse("heads=0.75"), tmp_path / "out")
    with pytest.raises(UsageError, match="--form ragged: Gemma 3"):
        extract(folder, Granularity.parse("heads=0.5:1:1:1"), tmp_path / "out", form="ragged")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_bfloat16_model_is_as_near_to_transformers_as_that_is_to_fp32() -> None:
    exact, tokens_BT = make_model(), torch.arange(40)[None]
    exact_BTV = exact(tokens_BT)
    model = exact.to(torch.bfloat16)
    ours_BTV, theirs_BTV = model(tokens_BT), to_hugging_face(model)(tokens_BT).logits
    rounding = float((theirs_BTV - exact_BTV).abs().mean())
    assert float((ours_BTV - theirs_BTV).abs().mean()) <= 1.5 * rounding


def write_theirs(model: ElasticLM, path: Path, **keys: float) -> Path:
    """Write a GGUF file as llama.cpp's converter does: gains with their 1, rows of heads as they are."""
    config, writer = model.config, gguf.GGUFWriter(path, "gemma3")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    for key, value in keys.items():
        writer.add_float32(f"gemma3.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            numbers = tensor.float().numpy() + (1 if name.endswith("norm.weight") else 0)
            writer.add_tensor(names.get_name(name, (".weight",)) or name, numbers.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_a_gguf_file_opens_as_in_transformers(tmp_path: Path) -> None:
    """Of 8 layers the sixth reads all positions; both sides assume it, as the file does not say."""
    kinds = (*[SLIDING] * 5, WHOLE, *[SLIDING] * 2)
    sizes = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 8}
    model = make_model(**sizes, layer_types=kinds, rope_local_base_freq=1e4, rope_theta=1e6)
    path = write_theirs(model, tmp_path / "m.gguf")
    ours = load_model(path).model
    assert ours.config.layer_types == kinds
    load: Any = load_gguf_checkpoint
    config: Any = AutoConfig.for_model(**load(path)["config"])
    theirs: Any = Gemma3ForCausalLM(config)
    tensors = load(path, return_tensors=True, model_to_load=theirs)["tensors"]
    theirs.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    tokens_BT = torch.arange(40)[None]
    ours_BTV, theirs_BTV = ours(tokens_BT), theirs.eval()(tokens_BT).logits
    atol = SUM_ORDER * float(theirs_BTV.abs().max())
    torch.testing.assert_close(ours_BTV, theirs_BTV, atol=atol, rtol=0)
    torch.testing.assert_close(ours_BTV, model(tokens_BT), atol=atol, rtol=0)


def test_gguf_files_that_cap_logits_are_refused_and_none_is_written(tmp_path: Path) -> None:
    model = make_model()
    path = write_theirs(model, tmp_path / "m.gguf", final_logit_softcapping=30.0)
    with pytest.raises(NestlingError, match="final_logit_softcapping"):
        load_model(path)
    with pytest.raises(UsageError, match="--format hf"):
        write_gguf(model, tmp_path / "n.gguf", dtype="fp32")
