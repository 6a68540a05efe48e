"""What decode_step.c reads of a model and of requests: the structs of models/kernels/pass.h."""

import ctypes

from models.kernels.pack import Map
from models.kernels.sample import Sampling

_Floats = ctypes.c_void_p
MAPS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Maps of a layer, and where they are in a block."""


class LayerStruct(ctypes.Structure):
    """A layer of a member."""

    _fields_ = [
        *((name, Map) for name in MAPS),
        *((name, _Floats) for name in ("attention_norm", "ffn_norm", "query_norm", "key_norm")),
        *((name, ctypes.c_int32) for name in ("index", "groups", "ffn", "rotates")),
    ]


class ModelStruct(ctypes.Structure):
    """A member, with its head."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("cache", "embedding")),
        *((name, ctypes.c_int32) for name in ("hidden", "head_dim", "heads_per_group", "query_width", "ffn")),
        *((name, ctypes.c_int32) for name in ("num_layers", "num_outputs")),
        ("epsilon", ctypes.c_float),
        ("embeddings", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        *((name, _Floats) for name in ("cosines", "sines", "norm")),
        ("head", Map),
        ("layers", ctypes.POINTER(LayerStruct)),
    ]


class RequestStruct(ctypes.Structure):
    """A text and its cache."""

    _fields_ = [
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("positions", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("length", "count", "scored", "num_draws")),
        ("sampling", Sampling),
        ("chosen", ctypes.POINTER(ctypes.c_int64)),
    ]
