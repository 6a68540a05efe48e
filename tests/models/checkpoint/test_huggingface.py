"""Invariant 2 against stock transformers, and what the elastic class refuses to approximate."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from models.base.errors import NestlingError
from models.checkpoint.huggingface import (
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    to_hugging_face,
)
from models.checkpoint.huggingface_config import ARCHITECTURES
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.elastic.rope_scaling import RopeScaling
from tests.models.checkpoint.test_gemma3 import GEMMA3

SUM_ORDER = 1e-5
"""fp32 logits relative to the largest: stock attention and norms add in another order."""

SCALINGS = {
    "linear": RopeScaling(rope_type="linear", factor=4.0),
    "llama3": RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=24),
    "yarn": RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.1
    ),
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "mistral": {"num_attention_heads": 6, "rope_theta": 500000.0},
    "smollm3": {"no_rope_layers": (1, 0, 0, 1)},
    "gemma3_text": GEMMA3,
    "gemma3_text, positions stretched": {
        **GEMMA3,
        "rope_scaling": SCALINGS["linear"],
        "query_pre_attn_scalar": 12.0,
    },
    "gemma3_text, no window": {**GEMMA3, "layer_types": None},
    "one group a head": {"num_key_value_heads": 4},
    **{name: {"rope_scaling": scaling} for name, scaling in SCALINGS.items()},
}


def shaped(tiny_config: ElasticConfig, name: str) -> ElasticLM:
    """A model whose every parameter is random, biases and norms included: a forgotten one shows."""
    model = ElasticLM(dataclasses.replace(tiny_config, **SHAPES[name]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(64, (3, 100), generator=torch.Generator().manual_seed(2))


def assert_logits_equal(ours_BTV: Tensor, theirs_BTV: Tensor) -> None:
    assert torch.equal(ours_BTV.argmax(-1), theirs_BTV.argmax(-1))
    atol = SUM_ORDER * float(theirs_BTV.abs().max())
    torch.testing.assert_close(ours_BTV, theirs_BTV, atol=atol, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_the_full_model_equals_its_stock_architecture(tiny_config: ElasticConfig, name: str) -> None:
    ours = shaped(tiny_config, name)
    theirs = to_hugging_face(ours)
    model_type, *_ = name.split(",")
    assert theirs.config.model_type == (model_type if model_type in ARCHITECTURES else "llama")
    assert_logits_equal(ours(tokens()), theirs(tokens()).logits)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_go_to_stock_and_back_unchanged(tiny_config: ElasticConfig, name: str) -> None:
    there = shaped(tiny_config, name)
    back = from_hugging_face(to_hugging_face(there))
    assert back.config == there.config
    assert back.state_dict().keys() == there.state_dict().keys()
    for tensor, same in zip(there.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(tensor, same)
    tied = back.lm_head.weight is back.model.embed_tokens.weight
    assert tied == there.config.tie_word_embeddings


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_a_model_that_transformers_made_fits(model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    theirs = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    ours = from_hugging_face(theirs)
    assert_logits_equal(ours(tokens()), theirs(tokens()).logits)


def test_converting_leaves_the_random_state_and_the_original_alone(tiny_model: ElasticLM) -> None:
    state = torch.get_rng_state()
    theirs = to_hugging_face(tiny_model)
    with torch.no_grad():
        next(iter(theirs.parameters())).zero_()
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_model.model.embed_tokens.weight.abs().sum() > 0


def test_a_bfloat16_model_stays_one(tiny_model: ElasticLM) -> None:
    theirs = to_hugging_face(tiny_model.to(torch.bfloat16))
    assert theirs.dtype == from_hugging_face(theirs).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_survives_the_way_there_and_back(tiny_config: ElasticConfig, name: str) -> None:
    config = dataclasses.replace(tiny_config, **SHAPES[name], bos_token_id=1, eos_token_id=2)
    fields = config_to_hugging_face(config)
    assert config_from_hugging_face(fields) == config
    through_transformers = AutoConfig.for_model(**fields).to_dict()
    assert config_from_hugging_face(through_transformers) == config
    assert fields["head_dim"] == config.head_dim


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_field_left_out_means_what_transformers_assumes(model_type: str) -> None:
    fields: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        **({} if model_type == "gemma3_text" else {"sliding_window": None}),
    }
    assert config_from_hugging_face(fields) == config_from_hugging_face(
        AutoConfig.for_model(**fields).to_dict()
    )


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_the_old_spelling_of_rope_is_read() -> None:
    old = config_from_hugging_face(LLAMA | {"rope_theta": 5e5, "rope_scaling": None})
    new = config_from_hugging_face(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5


def test_a_window_that_no_context_outgrows_is_no_window() -> None:
    fields = LLAMA | {"model_type": "mistral", "num_key_value_heads": 4, "max_position_embeddings": 512}
    assert config_from_hugging_face(fields | {"sliding_window": 512}).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral'"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures="),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_type='longrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_slow=1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters="),
        ({"rope_parameters": "default"}, "rope_parameters='default'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"model_type": "mistral"}, "sliding_window=4096"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window=4096"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "layer_types="),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "smollm3", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "smollm3", "mlp_bias": True}, "mlp_bias=True"),
        ({"model_type": "smollm3", "layer_types": ["sliding_attention"] * 2}, "layer_types="),
        ({"model_type": "smollm3", "no_rope_layers": [0]}, "no_rope_layers lists 1 layers of"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 2]}, r"no_rope_layers=\[0, 2\]"),
        ({"model_type": "smollm3", "no_rope_layers": "every 4th"}, "no_rope_layers='every 4th'"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id='2'"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_what_the_elastic_class_cannot_hold_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(NestlingError, match=named) as caught:
        config_from_hugging_face(LLAMA | change)
    assert "\n" not in str(caught.value)


def test_qk_norm_with_bias_has_no_stock_architecture(tiny_config: ElasticConfig) -> None:
    both = dataclasses.replace(tiny_config, qk_norm=True, attention_bias=True)
    with pytest.raises(NestlingError, match=r"qk_norm=true with attention_bias=true"):
        config_to_hugging_face(both)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_layers_without_positions_are_read_by_list_and_by_interval(interval: int) -> None:
    fields = LLAMA | {"model_type": "smollm3", "num_hidden_layers": 6, "no_rope_layer_interval": interval}
    theirs = AutoConfig.for_model(**fields).to_dict()
    ours = config_from_hugging_face(fields)
    assert list(ours.no_rope_layers or ()) == theirs["no_rope_layers"]
    assert ours == config_from_hugging_face(theirs)
    longer = fields | {"no_rope_layers": [*theirs["no_rope_layers"], 0, 1]}
    assert config_from_hugging_face(longer) == ours


def test_a_list_that_leaves_no_layer_without_positions_says_nothing() -> None:
    fields = LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 1]}
    assert config_from_hugging_face(fields).no_rope_layers is None


@pytest.mark.parametrize("other", [{"qk_norm": True}, {"attention_bias": True}])
def test_layers_without_positions_go_with_neither_biases_nor_head_norms(
    tiny_config: ElasticConfig, other: dict[str, Any]
) -> None:
    both = dataclasses.replace(tiny_config, no_rope_layers=(1, 1, 1, 0), **other)
    with pytest.raises(NestlingError, match="no stock architecture"):
        config_to_hugging_face(both)


def test_a_stock_model_with_a_biased_output_projection_is_refused() -> None:
    config = AutoConfig.for_model(**LLAMA, num_key_value_heads=2, attention_bias=True)
    with pytest.raises(NestlingError, match="attention_bias=True"):
        from_hugging_face(AutoModelForCausalLM.from_config(config))  # type: ignore[no-untyped-call]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "linear", "factor": 3},
        {
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 40,
        },
        YARN,
        YARN | {"mscale": 0.7, "mscale_all_dim": 0.5},
        YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 4.0},
    ],
)
@torch.no_grad()
def test_stretched_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    fields = LLAMA | {
        "hidden_size": 32,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "rope_scaling": rope,
    }
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()  # type: ignore[no-untyped-call]
    ours = from_hugging_face(theirs)
    assert ours.config == config_from_hugging_face(fields)
    assert_logits_equal(ours(tokens()), theirs(tokens()).logits)
    again = AutoConfig.for_model(**config_to_hugging_face(ours.config))
    assert config_from_hugging_face(again.to_dict()) == ours.config
