"""A granularity seen in place: calls like a model, has no memory of its own."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from models.base.errors import UsageError
from models.elastic.cache import Memory
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity, Plan
from models.elastic.model import ElasticLM
from models.elastic.owned import Owned, Parts
from models.elastic.ownership import is_owned
from models.elastic.request import Request

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


class Scorer(Protocol):
    """Anything that scores tokens in decoding: a model, a member in place, or one with a trimmed head."""

    @property
    def full(self) -> ElasticLM:
        """The full model whose weights these are."""
        ...

    @property
    def granularity(self) -> Granularity:
        """The member of the full model that runs."""
        ...

    @property
    def key(self) -> Hashable:
        """Requests to scorers with equal keys may share a pass."""
        ...

    @property
    def can_draw(self) -> bool:
        """True if a pass can draw tokens and go on by itself."""
        ...

    def run(self, requests: Sequence[Request]) -> Tensor:
        """Return the rows of requests, whose tokens share one pass; those of the first come first.

        A row is the logits [V] of a scored token, or the probabilities that a token was drawn from. The
        pass writes keys and values behind what the caches have committed, and commits nothing.
        """
        ...


class View:
    """One member of an elastic model, without a copy of its weights.

    Args:
        model: the elastic model.
        granularity: the member.

    Raises:
        UsageError: if the granularity does not fit the model.
    """

    def __init__(self, model: ElasticLM, granularity: Granularity) -> None:
        self.model = model
        self.granularity = granularity
        self.plan: Plan = granularity.resolve(model.config)

    def __call__(
        self, tokens_BT: Tensor, memory: Memory | None = None, *, num_last: int | None = None
    ) -> Tensor:
        """Return logits [B, T, V]; see `ElasticLM.forward`."""
        logits_BTV: Tensor = self.model(tokens_BT, self.granularity, memory, num_last=num_last)
        return logits_BTV

    @property
    def owned(self) -> Owned | None:
        """What the member has for itself, if anything."""
        return self.model.owned_by(self.granularity)

    @property
    def owned_bytes(self) -> int:
        """Bytes of what the member has for itself."""
        return 0 if self.owned is None else self.owned.num_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights are stored."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def norm(self, x_BTD: Tensor) -> Tensor:
        """See `ElasticLM.norm`."""
        return self.model.norm(x_BTD, self.granularity)

    def head(self, x_BTD: Tensor) -> Tensor:
        """See `ElasticLM.head`."""
        return self.model.head(x_BTD, self.granularity)

    @property
    def full(self) -> ElasticLM:
        """See `Scorer`."""
        return self.model

    @property
    def key(self) -> tuple[int, Granularity]:
        """See `Scorer`."""
        return id(self.model), self.granularity

    @property
    def can_draw(self) -> bool:
        """See `Scorer`."""
        return self.model.can_draw

    def run(self, requests: Sequence[Request]) -> Tensor:
        """See `Scorer`."""
        return self.model.run(requests, self.granularity)

    @property
    def config(self) -> ElasticConfig:
        """The shape of this member as a model of its own.

        Raises:
            UsageError: if its layers differ from each other, which no single shape describes.
        """
        if not self.plan.is_uniform:
            raise UsageError(f"granularity: the layers of {self.granularity} differ in width")
        return widest(self.model.config, self.plan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the member's tensors as a model of its own, layers renumbered.

        They are prefix slices of the full model's, whose memory they share, but for what the member owns.
        """
        parts = self.model.parts(self.granularity)
        state = {
            name: self._own(parts, name, tensor)
            for name, tensor in self.model.state_dict().items()
            if not is_owned(name) and not name.startswith("model.layers.")
        }
        full = self.model.model.layers.state_dict()
        for position, layer in enumerate(self.plan.layers):
            for name, shape in layer.shapes(self.model.config).items():
                prefix = full[f"{layer.index}.{name}"][tuple(map(slice, shape))]
                state[f"model.layers.{position}.{name}"] = self._own(
                    parts, f"model.layers.{layer.index}.{name}", prefix
                )
        return state

    def _own(self, parts: Parts | None, name: str, tensor: Tensor) -> Tensor:
        return tensor if parts is None else parts.merge(name.removeprefix("model."), tensor)


def widest(config: ElasticConfig, plan: Plan) -> ElasticConfig:
    """Return the shape of as many layers as run, each as wide as the widest."""
    groups = max(layer.groups for layer in plan.layers)
    rotated = config.no_rope_layers and [config.no_rope_layers[layer.index] for layer in plan.layers]
    kinds = config.layer_types and [config.layer_types[layer.index] for layer in plan.layers]
    return dataclasses.replace(
        config,
        num_hidden_layers=len(plan.layers),
        no_rope_layers=rotated,
        layer_types=kinds,
        intermediate_size=max(layer.ffn for layer in plan.layers),
        num_key_value_heads=groups,
        num_attention_heads=groups * config.heads_per_group,
    )


def cut_layers(model: ElasticLM, first: int, last: int) -> ElasticLM:
    """Return some consecutive layers as a model of their own that shares the source's tensors.

    It has the source's embedding, norm and head, too, which nothing reads that runs the layers alone.
    """
    plan = Granularity(layers=tuple(range(first, last + 1))).resolve(model.config)
    with torch.device("meta"):  # without memory: every tensor is the source's
        part = ElasticLM(widest(model.config, plan))
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer = _LAYER.match(name)
        if layer is None and not is_owned(name):
            state[name] = tensor
        elif layer is not None and first <= int(layer[1]) <= last:
            state[f"model.layers.{int(layer[1]) - first}.{layer[2]}"] = tensor
    part.load_state_dict(state, assign=True)
    part.rotary, part.is_mapped = model.rotary, model.is_mapped
    return part.train(model.training)


Model: TypeAlias = ElasticLM | View
"""Anything that decodes: the elastic model, or a member of it in place."""
