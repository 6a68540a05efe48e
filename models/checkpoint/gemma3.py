"""The `config.json` of a text model of Gemma 3 (https://arxiv.org/abs/2503.19786), both ways.

Beside what it shares with Llama it has layers that read a window of positions, with rotary frequencies of
their own, norms of what attention and the feed-forward part add, gains stored as their difference from 1,
GeGLU, and embeddings times the root of their width.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from models.base.errors import NestlingError
from models.checkpoint.huggingface_rope import rope_from_hugging_face, rope_to_hugging_face
from models.elastic.config import SLIDING, WHOLE, ElasticConfig
from models.elastic.rope_scaling import RopeScaling

GEMMA3 = "gemma3_text"
STYLE: Mapping[str, Any] = {
    "qk_norm": True,
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "norm_offset": True,
    "scale_embeddings": True,
}
"""What each of its layers computes otherwise than Llama's."""
WITH_IMAGES = "gemma3"
HINTS = {WITH_IMAGES: "; it reads images, too: save its text model alone (docs/pretrained.md)"}
"""What to do with a model type that is near to one that is supported."""
THETAS = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": STYLE["hidden_act"],
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""What transformers assumes of a field that a file leaves out."""
_SWITCHES = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")


def has_style(config: ElasticConfig) -> bool:
    """Return whether a shape asks for anything that only Gemma 3 has.

    Raises:
        NestlingError: if it asks for a part of that alone, which no stock architecture is.
    """
    own = {name: getattr(config, name) for name in STYLE}
    asks = config.layer_types is not None or config.query_pre_attn_scalar != 0
    if not asks and all(own[name] == getattr(ElasticConfig, name) for name in STYLE if name != "qk_norm"):
        return False
    if own == STYLE and not config.attention_bias and config.no_rope_layers is None:
        return True
    raise NestlingError(
        "model: a part of what Gemma 3 computes has no stock architecture; it needs "
        f"{', '.join(f'{name}={value}' for name, value in STYLE.items())}, without attention_bias and "
        "no_rope_layers"
    )


def gemma3_to_hugging_face(config: ElasticConfig) -> dict[str, Any]:
    """Return the fields in which its `config.json` differs from that of others.

    Raises:
        NestlingError: if the stock class refuses the number of heads.
    """
    if config.hidden_size % config.num_attention_heads:
        raise NestlingError(
            f"Gemma 3 in transformers refuses num_attention_heads={config.num_attention_heads}, which do not "
            f"divide hidden_size={config.hidden_size}; keep another fraction of the heads"
        )
    scalar = config.query_pre_attn_scalar or config.head_dim
    local = config.rope_local_base_freq or THETAS["rope_local_base_freq"]
    return {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "layer_types": list(config.layer_types or [WHOLE] * config.num_hidden_layers),
        # Masks are made for each kind of layers, whether a layer is of it or not.
        "sliding_window": config.sliding_window or DEFAULTS["sliding_window"],
        "rope_parameters": {
            WHOLE: rope_to_hugging_face(config),
            SLIDING: {"rope_type": "default", "rope_theta": local},
        },
        "rope_local_base_freq": local,  # for older readers, like rope_theta
        "attention_bias": False,
        **dict.fromkeys(_SWITCHES[:2]),
        "use_bidirectional_attention": False,
    }


def unsupported_of_gemma3(fields: Mapping[str, Any]) -> Iterable[tuple[str, Any, str]]:
    """Return every (field, value, remedy) that the elastic class does not compute."""
    for name in _SWITCHES:
        if fields.get(name):
            yield name, fields[name], "only null is"
    if fields["hidden_activation"] != STYLE["hidden_act"]:
        yield "hidden_activation", fields["hidden_activation"], f"only {STYLE['hidden_act']} is"
    if fields.get("attention_bias"):
        yield "attention_bias", fields["attention_bias"], "only false is"


def layer_types_of(fields: Mapping[str, Any], num_layers: int, pattern: int) -> list[str]:
    """Return the kind of each layer: a list states it, or which layers are whole, every so many.

    Raises:
        NestlingError: naming the field and the value that is of another kind.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        if pattern < 1:
            raise NestlingError(f"sliding_window_pattern={pattern} must be at least 1")
        return [SLIDING if (layer + 1) % pattern else WHOLE for layer in range(num_layers)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise NestlingError(f"layer_types={kinds!r} is not a list of names; give a kind for each layer")
    return kinds


def ropes_of(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """Read the base of the frequencies and how they are stretched, then the base in layers with a window.

    Raises:
        NestlingError: naming the field and the value that is of another kind.
    """
    tables = fields.get("rope_parameters") or {}
    if not isinstance(tables, Mapping) or (tables and not {*tables} & {WHOLE, SLIDING}):
        raise NestlingError(
            f"rope_parameters={tables!r} is not a table with the settings of {WHOLE} and of {SLIDING}"
        )
    whole, near = (tables.get(kind) or {} for kind in (WHOLE, SLIDING))
    both = {name: {**fields, "rope_theta": theta, "rope_scaling": None} for name, theta in _thetas(fields)}
    scaling = fields.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, Mapping):
        raise NestlingError(f"rope_scaling={scaling!r} is not a table of settings; give the one of the model")
    whole = {**whole, **(scaling or {})} if isinstance(whole, Mapping) else whole
    theta, stretched = rope_from_hugging_face({**both["rope_theta"], "rope_parameters": whole})
    local, others = rope_from_hugging_face({**both["rope_local_base_freq"], "rope_parameters": near})
    if others is not None:
        raise NestlingError(f"rope_type={others.rope_type!r} of {SLIDING} is not supported; only default is")
    return theta, stretched, local


def _thetas(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    given = ((name, fields.get(name)) for name in THETAS)
    return [(name, THETAS[name] if value is None else value) for name, value in given]
