"""The shape of an elastic model and the `config.json` of a stock one, both ways; pure dictionaries.

One elastic class holds what six stock architectures compute:

    layer_types, post_norms and the like  -> Gemma3ForCausalLM, see models/checkpoint/gemma3.py
    no_rope_layers                        -> SmolLM3ForCausalLM
    qk_norm                               -> Qwen3ForCausalLM
    attention_bias                        -> Qwen2ForCausalLM
    heads that do not divide hidden_size  -> MistralForCausalLM, without a window
    all else                              -> LlamaForCausalLM

What the elastic class cannot hold exactly is refused, never approximated.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from models.base.errors import NestlingError
from models.checkpoint.gemma3 import (
    DEFAULTS,
    GEMMA3,
    HINTS,
    STYLE,
    gemma3_to_hugging_face,
    has_style,
    layer_types_of,
    ropes_of,
    unsupported_of_gemma3,
)
from models.checkpoint.huggingface_rope import rope_from_hugging_face, rope_to_hugging_face
from models.elastic.config import ElasticConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    GEMMA3: "Gemma3ForCausalLM",
}
# The release whose spelling `config_to_hugging_face` follows. Without it in the file, transformers
# suspects the large vocabulary of any Mistral model of an old fault.
SPELLING = "5.23.0"


def config_to_hugging_face(
    config: ElasticConfig, *, dtype: str = "float32", model_type: str | None = None
) -> dict[str, Any]:
    """Return the `config.json` of the stock architecture that computes the same function.

    Args:
        config: the elastic shape.
        dtype: dtype of the weights that it describes, as in `float32` or `bfloat16`.
        model_type: the architecture's, where another one than the default computes the same.

    Raises:
        NestlingError: if no stock architecture holds it.

    >>> shape = dict(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> fields = config_to_hugging_face(
    ...     ElasticConfig(**shape, num_attention_heads=3, num_key_value_heads=3, head_dim=4)
    ... )
    >>> fields["architectures"], fields["sliding_window"], fields["head_dim"]
    (['MistralForCausalLM'], None, 4)
    """
    model_type = model_type or _model_type(config)
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in _SAME},
        "eos_token_id": json_eos(config),
        "attention_dropout": 0.0,
        "use_cache": True,
        # Readers older than rope_parameters would assume 10000 without this one.
        "rope_theta": config.rope_theta,
        "dtype": dtype,
        "transformers_version": SPELLING,
    }
    if model_type == GEMMA3:
        return fields | gemma3_to_hugging_face(config)
    fields |= {"hidden_act": config.hidden_act, "rope_parameters": rope_to_hugging_face(config)}
    if model_type in _BIASES_OUTPUT:
        fields["attention_bias"] = False
    if model_type in _BIASES_MLP:
        fields["mlp_bias"] = False
    if model_type != "llama":
        fields["sliding_window"] = None
    if model_type not in ("llama", "mistral"):
        fields["use_sliding_window"] = False
    if config.no_rope_layers is not None:
        fields["no_rope_layers"] = list(config.no_rope_layers)
        fields["pad_token_id"] = None  # else transformers assumes one of a large vocabulary
    return fields


def config_from_hugging_face(fields: Mapping[str, Any]) -> ElasticConfig:
    """Read a `config.json` of one of `ARCHITECTURES`, RoPE spelled the old or the new way.

    Fields that change only training (dropout) or storage are ignored.

    Raises:
        NestlingError: naming the field and the value that the elastic class cannot hold exactly.

    >>> config_from_hugging_face({"model_type": "gpt2"})
    Traceback (most recent call last):
    models.base.errors.NestlingError: model_type='gpt2' is not supported; llama, mistral, qwen2, qwen3,
    smollm3 and gemma3_text are
    """
    model_type = str(fields.get("model_type"))
    if model_type not in ARCHITECTURES:
        *first, last = ARCHITECTURES
        raise NestlingError(
            f"model_type={fields.get('model_type')!r} is not supported; {', '.join(first)} and {last} are"
            + HINTS.get(model_type, "")
        )
    fields = {**_DEFAULTS["all"], **_DEFAULTS[model_type], **fields}
    sizes: dict[str, Any] = {name: _integer(fields, name) for name in _SIZES}
    for name, value, allowed in _unsupported(model_type, fields):
        raise NestlingError(f"{name}={value!r} is not supported for {model_type}; {allowed}")
    theta, scaling = (rope_from_hugging_face if model_type != GEMMA3 else ropes_of)(fields)[:2]
    heads = sizes["num_attention_heads"]
    return ElasticConfig(
        **sizes,
        num_key_value_heads=_integer(fields, "num_key_value_heads", default=heads),
        head_dim=_integer(fields, "head_dim", default=0),
        rope_theta=theta,
        rope_scaling=scaling,
        no_rope_layers=_rotated(fields, sizes["num_hidden_layers"]) if model_type == "smollm3" else None,
        rms_norm_eps=_number(fields, "rms_norm_eps"),
        initializer_range=_number(fields, "initializer_range"),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        attention_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", GEMMA3),
        bos_token_id=_token(fields, "bos_token_id"),
        eos_token_id=end_tokens(fields),
        **(_of_gemma3(fields, sizes["num_hidden_layers"]) if model_type == GEMMA3 else {}),
    )


def json_eos(config: ElasticConfig) -> int | list[int] | None:
    """Return the tokens that end a text as a file spells them: one, a list of several, or null."""
    ids = config.eos_token_ids
    return list(ids) if len(ids) > 1 else config.first_eos_token_id


def end_tokens(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a text, by a `config.json` or `generation_config.json`: any number of them.

    Raises:
        NestlingError: naming what is no token.
    """
    value = fields.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(_integer({"eos_token_id": item}, "eos_token_id") for item in values)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_SAME = (
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
)
_BIASES_OUTPUT, _BIASES_MLP = ("llama", "qwen3", "smollm3"), ("llama", "smollm3")
"""Architectures whose attention_bias is on o_proj as well, and whose other matrices may have one."""
# Values that transformers assumes when a file leaves a field out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "all": {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    },
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
    },
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "no_rope_layer_interval": 4,
    },
    GEMMA3: DEFAULTS,
}


def _model_type(config: ElasticConfig) -> str:
    if has_style(config):
        return GEMMA3
    if config.qk_norm and config.attention_bias:
        raise NestlingError(
            "model: qk_norm=true with attention_bias=true has no stock architecture "
            "(Qwen3 would also bias o_proj); choose one of them"
        )
    if config.no_rope_layers is not None and (config.qk_norm or config.attention_bias):
        raise NestlingError(
            "model: no_rope_layers with qk_norm=true or attention_bias=true has no stock architecture; "
            "choose one of them"
        )
    if config.no_rope_layers is not None:
        return "smollm3"
    if config.qk_norm:
        return "qwen3"
    if config.attention_bias:
        return "qwen2"
    # LlamaConfig refuses it; Mistral's class computes the same and does not mind.
    return "mistral" if config.hidden_size % config.num_attention_heads else "llama"


def _unsupported(model_type: str, fields: Mapping[str, Any]) -> Iterable[tuple[str, Any, str]]:
    """Return every (field, value, remedy) that would change the function that the weights compute."""
    architectures = fields.get("architectures")
    if architectures and architectures != [ARCHITECTURES[model_type]]:
        yield "architectures", architectures, f"only {ARCHITECTURES[model_type]} is"
    if fields.get("quantization_config"):
        yield "quantization_config", fields["quantization_config"], "save the weights unquantized"
    if model_type == GEMMA3:
        yield from unsupported_of_gemma3(fields)
        return
    if fields["hidden_act"] not in ("silu", "swish"):
        yield "hidden_act", fields["hidden_act"], "only silu is"
    if model_type in _BIASES_OUTPUT and _flag(fields, "attention_bias"):
        yield "attention_bias", True, "it also biases o_proj; a bias on q, k and v alone (qwen2) is"
    if model_type in _BIASES_MLP and _flag(fields, "mlp_bias"):
        yield "mlp_bias", True, "only false is"
    if model_type != "llama":
        yield from _sliding(model_type, fields)


def _sliding(model_type: str, fields: Mapping[str, Any]) -> Iterable[tuple[str, Any, str]]:
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        yield "layer_types", kinds, "only full_attention is"
    window = fields.get("sliding_window")
    active = model_type == "mistral" or _flag(fields, "use_sliding_window")
    # A window that no context outgrows hides nothing.
    if (
        active
        and window is not None
        and _integer(fields, "sliding_window") < _integer(fields, "max_position_embeddings")
    ):
        remedy = f"only null or at least max_position_embeddings={fields['max_position_embeddings']} is"
        yield "sliding_window", window, remedy


def _rotated(fields: Mapping[str, Any], num_layers: int) -> list[int]:
    """Return for each layer of SmolLM3 1 if it has positions, else 0."""
    rotated = fields.get("no_rope_layers")
    if rotated is None:
        interval = _integer(fields, "no_rope_layer_interval")
        if interval < 1:
            raise NestlingError(f"no_rope_layer_interval={interval} must be at least 1")
        return [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(rotated, list) or not all(one in (0, 1) for one in rotated):
        raise NestlingError(f"no_rope_layers={rotated!r} is not a list of 0 and 1; give one for each layer")
    return rotated


def _of_gemma3(fields: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    pattern, scalar = _integer(fields, "sliding_window_pattern"), _number(fields, "query_pre_attn_scalar")
    return {
        **{name: value for name, value in STYLE.items() if name != "qk_norm"},
        "layer_types": layer_types_of(fields, num_layers, pattern),
        "sliding_window": _integer(fields, "sliding_window", default=0),
        "rope_local_base_freq": ropes_of(fields)[2],
        "query_pre_attn_scalar": 0.0 if scalar == fields["head_dim"] else scalar,
    }


def _integer(fields: Mapping[str, Any], name: str, *, default: int | None = None) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise NestlingError(f"{name}={value!r} is not a whole number; give the one that the weights have")
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NestlingError(f"{name}={value!r} is not a number; give the one that the weights were made with")
    if not abs(value) <= sys.float_info.max:
        raise NestlingError(
            f"{name}={str(value)[:40]} is not finite; give the one that the weights were made with"
        )
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields[name]
    if not isinstance(value, bool):
        raise NestlingError(f"{name}={value!r} is not true or false; give what the weights were made with")
    return value


def _token(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise NestlingError(f"{name}={value!r} lists several tokens; keep one in config.json")
    return None if value is None else _integer({name: value}, name)
