"""The forms of an extraction: what stands in its folder.

    stock     layers are equal: a smaller model of a stock architecture
    ragged    layers differ: true shapes, transformers' own `per_layer_config`, and a small modelling file,
              since stock classes do not build from that (https://github.com/huggingface/transformers/pull/45332)
    padded    layers differ: zeros up to the widest layer, which a stock architecture holds

Padding is exact but for the order of adding: a neuron of zeros gives silu(0) * 0, a group of zeros attends
evenly to values of zero, and both meet columns of zeros.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.checkpoint.gemma3 import GEMMA3, WITH_IMAGES
from models.checkpoint.huggingface_config import ARCHITECTURES, config_to_hugging_face
from models.checkpoint.weights import HEAD
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, LayerPlan, Plan
from models.elastic.view import View, widest

STOCK, RAGGED, PADDED = "stock", "ragged", "padded"
FORMS = (STOCK, RAGGED, PADDED)
PER_LAYER = "per_layer_config"
MODELING = "modeling_nestling.py"
_PREFIX = "Nestling"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What stands in the folder of an extraction.

    Args:
        form: one of `FORMS`.
        config: the shape; of unequal layers the widest.
        fields: config.json.
        tensors: weights by name.
        files: further text files by name.
        wasted: zeros that padding added.
        packed: what is stored in place of `tensors`, if matrices are in few bits.
    """

    form: str
    config: ElasticConfig
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: Mapping[str, str] = field(default_factory=dict)
    wasted: int = 0
    packed: Mapping[str, Tensor] | None = None

    @property
    def parameters(self) -> int:
        """Return how many numbers the weights are."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Return what stands in the file."""
        return self.tensors if self.packed is None else self.packed


def lay_out(view: View, form: str | None = None) -> Layout:
    """Return what the folder of a member holds; the tensors share the model's memory where they can.

    Args:
        view: the member.
        form: one of `FORMS`; None takes stock where layers are equal, else ragged.

    Raises:
        UsageError: if the form does not hold the member.
    """
    plan, config = view.plan, widest(view.model.config, view.plan)
    form = form or (STOCK if plan.is_uniform else RAGGED)
    if form not in FORMS:
        raise UsageError(f"--form {form} is not one of {', '.join(FORMS)}; choose one of them")
    if form == STOCK and not plan.is_uniform:
        raise UsageError(
            f"--form stock: the layers of {view.granularity} are unequal, which no stock architecture holds; "
            "take --form ragged or padded"
        )
    tensors = view.state_dict()
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    dtype = str(view.dtype).removeprefix("torch.")
    if form == RAGGED and not plan.is_uniform:
        fields = ragged_fields(config, plan, dtype=dtype)
        files = {MODELING: modeling_source(fields["model_type"])}
        return Layout(form=RAGGED, config=config, fields=fields, tensors=tensors, files=files)
    padded = pad(tensors, config)
    fields = config_to_hugging_face(config, dtype=dtype)
    wasted = sum(tensor.numel() for tensor in padded.values()) - sum(one.numel() for one in tensors.values())
    return Layout(
        form=STOCK if plan.is_uniform else PADDED, config=config, fields=fields, tensors=padded, wasted=wasted
    )


def pad(tensors: Mapping[str, Tensor], config: ElasticConfig) -> dict[str, Tensor]:
    """Return the tensors of layers filled up with zeros to the shapes of a model.

    Raises:
        NestlingError: if a tensor is larger than there.
    """
    shapes = {
        f"model.layers.{layer.index}.{name}": shape
        for layer in FULL.resolve(config).layers
        for name, shape in layer.shapes(config).items()
    }
    return {name: _pad(name, tensor, shapes.get(name)) for name, tensor in tensors.items()}


def _pad(name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is None or tensor.shape == shape:
        return tensor
    if tensor.ndim != len(shape) or any(own > most for own, most in zip(tensor.shape, shape, strict=True)):
        raise NestlingError(f"weights do not fit the configuration: {name} is {list(tensor.shape)}")
    padded = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    padded[tuple(map(slice, tensor.shape))] = tensor
    return padded


def ragged_fields(config: ElasticConfig, plan: Plan, *, dtype: str) -> dict[str, Any]:
    """Return the config.json of unequal layers: the widest layer's numbers, and what others have instead."""
    fields = config_to_hugging_face(config, dtype=dtype)
    if len({layer.groups for layer in plan.layers}) > 1:
        # Some classes check the number of heads, of which there is no single one; Mistral's does not.
        if fields["model_type"] == GEMMA3:
            raise UsageError(
                "--form ragged: Gemma 3 in transformers has one number of heads for all layers; give all "
                "layers one fraction of the heads, or take --form padded"
            )
        if fields["model_type"] == "llama":
            fields = config_to_hugging_face(config, dtype=dtype, model_type="mistral")
    fields["architectures"] = [_class_name(fields["model_type"])]
    fields["auto_map"] = auto_map(fields["model_type"])
    overrides = (_overrides(config, layer) for layer in plan.layers)
    fields[PER_LAYER] = {str(place): one for place, one in enumerate(overrides) if one}
    return fields


def auto_map(model_type: str) -> dict[str, str]:
    """Return which classes of the modelling file stand for transformers' own."""
    module = MODELING.removesuffix(".py")
    return {
        "AutoModel": f"{module}.{_class_name(model_type, 'Model')}",
        "AutoModelForCausalLM": f"{module}.{_class_name(model_type)}",
    }


def _overrides(config: ElasticConfig, layer: LayerPlan) -> dict[str, int]:
    own = {
        "intermediate_size": layer.ffn,
        "num_attention_heads": layer.groups * config.heads_per_group,
        "num_key_value_heads": layer.groups,
    }
    return {name: value for name, value in own.items() if value != getattr(config, name)}


def stock_architectures(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without what says that layers are unequal, if it is one that we wrote."""
    model_type = str(fields.get("model_type"))
    if not fields.get(PER_LAYER) or model_type not in ARCHITECTURES:
        return dict(fields)
    known = [_class_name(model_type)]
    architectures = fields.get("architectures")
    return {**fields, "architectures": None if architectures == known else architectures}


def _class_name(model_type: str, suffix: str = "ForCausalLM") -> str:
    return _PREFIX + ARCHITECTURES[model_type].removesuffix("ForCausalLM") + suffix


def modeling_source(model_type: str) -> str:
    """Return the modelling file: the stock classes, whose layers are built from `per_layer_config`."""
    stock = ARCHITECTURES[model_type].removesuffix("ForCausalLM")
    module, text, embedding = model_type, stock, "nn.Embedding({sizes})"
    if model_type == GEMMA3:
        module, text = WITH_IMAGES, "Gemma3Text"
        embedding = "stock.Gemma3TextScaledWordEmbedding({sizes}, config.hidden_size**0.5)"
    embedding = embedding.format(sizes="config.vocab_size, config.hidden_size, self.padding_idx")
    return _SOURCE.format(stock=stock, module=module, text=text, embedding=embedding)


_SOURCE = '''"""{stock} whose layers have widths of their own, as `per_layer_config` of config.json says.

All else is transformers': this file only builds each layer from its own configuration. Open the folder with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

from torch import nn
from transformers.models.{module} import modeling_{module} as stock


class Nestling{stock}Model(stock.{text}Model):
    def __init__(self, config):
        stock.{stock}PreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = {embedding}
        self.layers = nn.ModuleList(_layer(config, place) for place in range(config.num_hidden_layers))
        self.norm = stock.{stock}RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = stock.{stock}RotaryEmbedding(config=config)
        self.has_sliding_layers = False
        self.gradient_checkpointing = False
        self.post_init()


class Nestling{stock}ForCausalLM(stock.{stock}ForCausalLM):
    def __init__(self, config):
        stock.{stock}PreTrainedModel.__init__(self, config)
        self.model = Nestling{stock}Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _layer(config, place):
    layer = stock.{stock}DecoderLayer(config.per_layer_config[place], place)
    layer.self_attn.config = config  # so that the choice of an attention implementation reaches it
    return layer
'''
