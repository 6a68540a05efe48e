"""Rotary settings in a `config.json`, read in each spelling that transformers reads, written in its newest.

rope_theta: 1e4, rope_scaling: {type, factor ...}      up to transformers 4
rope_parameters: {rope_type, rope_theta, factor ...}   since transformers 5
"""

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

from models.base.errors import NestlingError
from models.elastic.config import ElasticConfig
from models.elastic.rope_scaling import RopeScaling, RopeType, yarn_attention_factor

_USED = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
"""The fields that each rule reads besides its factor."""


def rope_from_hugging_face(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read the base of the frequencies, and how they are stretched.

    Args:
        fields: a `config.json`, with `max_position_embeddings`.

    Raises:
        NestlingError: naming the field and the value that is of another kind.
    """
    rope = _settings(fields)
    theta = _number(rope, "rope_theta", fields.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise NestlingError(f"partial_rotary_factor={partial!r} is not supported; only 1 is")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in _USED:
        raise NestlingError(f"rope_type={rope_type!r} is not supported; default, {', '.join(_USED)} are")
    return theta, _scaling(rope_type, rope, fields)


def rope_to_hugging_face(config: ElasticConfig) -> dict[str, Any]:
    """Return the value of `rope_parameters`."""
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return {"rope_type": "default", **theta}
    used = ("factor", *_USED[scaling.rope_type])
    return {"rope_type": scaling.rope_type, **theta, **{name: getattr(scaling, name) for name in used}}


def _settings(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise NestlingError(f"{name}={rope!r} is not a table of settings; give the one of the model")
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise NestlingError(f"{name}={rope!r} differs between layers, which is not supported")
        if rope:
            return rope
    return {}


def _scaling(rope_type: RopeType, rope: Mapping[str, Any], fields: Mapping[str, Any]) -> RopeScaling:
    defaults = {field.name: field.default for field in fields_of(RopeScaling)}
    values: dict[str, Any] = {}
    for name in ("factor", *_USED[rope_type]):
        given = rope.get(name)
        values[name] = defaults[name] if given is None else given
    context = "original_max_position_embeddings"
    if context in values:  # transformers prefers the one that stands outside (Phi-3)
        values[context] = fields.get(context) or values[context] or fields.get("max_position_embeddings")
    if rope_type == "yarn" and rope.get("factor") is None:
        values["factor"] = _number(fields, "max_position_embeddings", None) / _number(values, context, None)
    if rope_type == "yarn" and rope.get("attention_factor") is None:
        exponents = [_number(rope, name, 0.0) for name in ("mscale", "mscale_all_dim")]
        values["attention_factor"] = yarn_attention_factor(_number(values, "factor", None), *exponents)
    for name in values.keys() - {"truncate"}:
        values[name] = _number(values, name, None)
    if context in values:
        values[context] = int(values[context])
    return RopeScaling(rope_type=rope_type, **values)


def _number(fields: Mapping[str, Any], name: str, default: Any) -> float:
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NestlingError(f"{name}={value!r} is not a number; give the one that the weights were made with")
    return float(value)
