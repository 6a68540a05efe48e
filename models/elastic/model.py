"""The elastic model: one set of weights, every member of the family a prefix of it.

    tokens -> embedding -> [ x + attention(norm(x));  x + mlp(norm(x)) ] per layer -> norm -> head

In Gemma's layers what is added goes through a norm, too.

A member runs the layers that its granularity keeps, over prefixes of their heads and neurons; the
embedding and the vocabulary head are everyone's, and so are the norms unless the member has its own
(models/elastic/owned.py). The state dict has Hugging Face's names,
so extraction is slicing. Source: MatFormer, https://arxiv.org/abs/2310.07707.

B batch, T positions, D model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.attention import Attention
from models.elastic.borrowed import Borrowed
from models.elastic.cache import Batch, KVCache, Memory
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity, LayerPlan, Plan
from models.elastic.layers import MLP, Rotary, without_rotation
from models.elastic.norm import RMSNorm
from models.elastic.owned import NOTHING, Owned, OwnedLayer, Parts
from models.elastic.ownership import is_owned
from models.elastic.request import Head, Request


class Block(nn.Module):
    """One pre-norm decoder layer.

    Hugging Face's name for the norm before the feed-forward part is `post_attention_layernorm`; where there
    are norms of what is added as well, that is the one after attention.
    """

    def __init__(self, config: ElasticConfig, layer: int) -> None:
        super().__init__()
        size, post_norms = config.hidden_size, config.post_norms
        self.input_layernorm = RMSNorm(size, config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(size, config)
        self.pre_feedforward_layernorm = RMSNorm(size, config) if post_norms else None
        self.post_feedforward_layernorm = RMSNorm(size, config) if post_norms else None
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: Tensor,
        plan: LayerPlan,
        rotary: tuple[Tensor, Tensor],
        memory: Memory | None,
        owned: OwnedLayer = NOTHING,
    ) -> Tensor:
        """Add attention, then the feed-forward part, to the residual stream."""
        before_attention = owned.input_layernorm or self.input_layernorm
        after_attention = owned.post_attention_layernorm or self.post_attention_layernorm
        before_mlp = owned.pre_feedforward_layernorm or self.pre_feedforward_layernorm
        after_mlp = owned.post_feedforward_layernorm or self.post_feedforward_layernorm

        def attend(y_BTD: Tensor) -> Tensor:
            mixed_BTD: Tensor = self.self_attn(y_BTD, plan.groups, rotary, memory, owned.self_attn)
            return mixed_BTD

        def feed(y_BTD: Tensor) -> Tensor:
            fed_BTD: Tensor = self.mlp(y_BTD, plan.ffn, owned.mlp)
            return fed_BTD

        if before_mlp is None or after_mlp is None:
            return after_attention.residual(before_attention.residual(x_BTD, attend), feed)
        x_BTD = before_attention.residual(x_BTD, lambda y_BTD: after_attention(attend(y_BTD)))
        return before_mlp.residual(x_BTD, lambda y_BTD: after_mlp(feed(y_BTD)))


class Embedding(nn.Embedding):
    """An embedding that draws nothing where it has no memory, as in a model that is about to be read.

    There torch would import its compiler, which takes longer than to read a model of a billion weights.
    """

    def reset_parameters(self) -> None:
        """See `nn.Embedding`."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Backbone(nn.Module):
    """Embedding, layers and final norm; exists so that names match Hugging Face's `model.*`."""

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)


class ElasticLM(nn.Module):
    """A decoder-only language model whose forward pass takes a granularity as an argument."""

    is_mapped = False
    """Whether weights are read where their file is mapped, and nobody changes them."""

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.owned = nn.ModuleList()
        self._borrowed: Borrowed | None = None  # by the last pass; its states, norm and head ask for it

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw normal weights; the two maps that write to the residual stream shrink with depth (GPT-2)."""
        std = self.config.initializer_range
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if is_owned(name):
                continue
            if name.endswith("norm.weight"):
                nn.init.constant_(parameter, 0.0 if self.config.norm_offset else 1.0)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if writes else std, generator=generator)

    granularity = FULL

    @property
    def members(self) -> list[Owned]:
        """What each member owns that owns anything."""
        return [cast(Owned, one) for one in self.owned]

    def owned_by(self, granularity: Granularity) -> Owned | None:
        """Return what a member owns; None if it owns nothing, as the full model does."""
        plan = granularity.resolve(self.config)
        return next((one for one in self.members if one.plan == plan), None)

    def parts(self, granularity: Granularity) -> Parts | None:
        """Return what a member's pass runs with beside the full model's weights.

        It is what the member owns, or what one that was not trained borrows from others.
        """
        if not len(self.owned):
            return None
        plan, members = granularity.resolve(self.config), self.members
        owned = next((one for one in members if one.plan == plan), None)
        if owned is not None or plan.is_layer_prefix:
            return owned
        if self._borrowed is None or not self._borrowed.is_of(plan, members):
            self._borrowed = Borrowed(self.config, plan, members)
        return self._borrowed

    @property
    def full(self) -> "ElasticLM":
        """See `Scorer`."""
        return self

    @property
    def key(self) -> tuple[int, Granularity]:
        """See `Scorer`."""
        return id(self), FULL

    is_compiled = False
    """Whether a pass is one call of compiled code."""

    @property
    def can_draw(self) -> bool:
        """See `Scorer`; only compiled passes do."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights are stored."""
        return self.model.embed_tokens.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the residual stream, without autocast."""
        return self.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.embed_tokens.weight.device

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of the keys and values that it keeps while it decodes."""
        return self.dtype

    def forward(
        self,
        tokens_BT: Tensor,
        granularity: Granularity = FULL,
        memory: Memory | None = None,
        *,
        num_last: int | None = None,
    ) -> Tensor:
        """Return logits [B, T, V] of a member.

        Args:
            tokens_BT: token ids.
            granularity: the member.
            memory: the earlier keys and values that attention reads; a `KVCache` is written to, not
                committed.
            num_last: the number of last positions to score (decoding needs one, training all).

        Raises:
            UsageError: if the granularity does not fit the model.
        """
        x_BTD = self.states(tokens_BT, granularity, memory)[-1]
        return self.head(x_BTD if num_last is None else x_BTD[:, -num_last:], granularity)

    @torch.no_grad()
    def run(
        self, requests: Sequence[Request], granularity: Granularity = FULL, head: Head | None = None
    ) -> Tensor:
        """See `Scorer`; the rows are [T, V], or [T, N] of a trimmed head.

        Args:
            requests: new tokens of one text each.
            granularity: the member.
            head: None is the model's own.
        """
        assert all(one.draws is None for one in requests), "a model that does not choose cannot draw"
        ids, counts = [token for one in requests for token in one.ids], [len(one.ids) for one in requests]
        # A single text is read with fewer operations than a batch of one.
        memory = requests[0].cache if len(requests) == 1 else Batch([one.cache for one in requests], counts)
        x_TD = self.states(torch.tensor([ids], device=self.device), granularity, memory)[-1][0]
        parts = zip(x_TD.split(counts), requests, strict=True)
        scored_TD = torch.cat([part_TD[-one.num_last :] for part_TD, one in parts])
        return self.head(scored_TD, granularity, None if head is None else head.map)

    def new_cache(self, num_positions: int) -> KVCache:
        """Return an empty cache for one row, in the dtype and on the device that passes expect."""
        return KVCache(self.config, num_positions=num_positions, dtype=self.cache_dtype, device=self.device)

    def states(
        self,
        tokens_BT: Tensor,
        granularity: Granularity = FULL,
        memory: Memory | None = None,
        *,
        exits: Sequence[int] = (),
    ) -> list[Tensor]:
        """Return residual streams [B, T, D] after each number of layers in `exits`, then the final one.

        A member that is a prefix of the layers at full width is an early exit of the full model's pass:
        `head(states(tokens, exits=(k,))[0], member)` are its logits.
        """
        return self._run_layers(self._embed(tokens_BT), granularity, memory, exits)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return what enters the first layer [..., D]."""
        x_D = F.embedding(tokens, self.model.embed_tokens.weight)
        if self.config.scale_embeddings:  # by a number that is rounded to their dtype, as in Gemma's training
            x_D = x_D * torch.tensor(self.config.hidden_size**0.5, dtype=x_D.dtype)
        return x_D.to(self.compute_dtype)

    def _run_layers(
        self, x_BTD: Tensor, granularity: Granularity, memory: Memory | None, exits: Sequence[int] = ()
    ) -> list[Tensor]:
        plan: Plan = granularity.resolve(self.config)
        num_tokens = x_BTD.shape[1]
        positions = slice(num_tokens) if memory is None else memory.positions(num_tokens)
        angles = self._angles(positions, x_BTD.dtype)
        parts, found = self.parts(granularity), dict[int, Tensor]()
        for count, layer_plan in enumerate(plan.layers, start=1):
            block = cast(Block, self.model.layers[layer_plan.index])
            own = NOTHING if parts is None else parts.layer(layer_plan.index)
            x_BTD = block(x_BTD, layer_plan, angles(layer_plan.index), memory, own)
            if count in exits:
                found[count] = x_BTD
        return [*(found[count] for count in exits), x_BTD]

    def _angles(
        self, positions: slice | Tensor, dtype: torch.dtype
    ) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Return a function from a layer to the cosines and signed sines by which it rotates."""
        rotary: tuple[Tensor, Tensor] = self.rotary(positions, dtype)
        local = self.rotary.local
        near: tuple[Tensor, Tensor] = rotary if local is None else local(positions, dtype)
        still = rotary if self.config.no_rope_layers is None else without_rotation(rotary)

        def of(layer: int) -> tuple[Tensor, Tensor]:
            if not self.config.rotates(layer):
                return still
            return rotary if self.config.window(layer) is None else near

        return of

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return what enters the first layer [T, D], in fp32, where the layers are elsewhere."""
        return self._embed(torch.tensor(ids, device=self.device)).float()

    def run_layers(self, x_TD: Tensor, cache: KVCache, num_last: int) -> Tensor:
        """Return what leaves the last layer [num_last, D], in fp32, where `x_TD` enters the first one.

        Keys and values are written behind what the cache has committed, as in `run`.
        """
        x_BTD = x_TD.to(self.device, self.compute_dtype)[None]
        return self._run_layers(x_BTD, FULL, cache)[-1][0, -num_last:].float()

    def score(self, x_TD: Tensor, norm: RMSNorm) -> Tensor:
        """Return logits [T, V] of what leaves the last layer of a model with this head and another norm."""
        return self.head(x_TD.to(self.device, self.compute_dtype), norm=norm)

    def norm(self, x_BTD: Tensor, granularity: Granularity = FULL) -> Tensor:
        """Return what the vocabulary head reads of a member's residual streams [..., D]."""
        parts = self.parts(granularity)
        return cast(Tensor, ((parts and parts.norm) or self.model.norm)(x_BTD))

    def head(
        self,
        x_BTD: Tensor,
        granularity: Granularity = FULL,
        linear: nn.Linear | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Return logits [..., V] of residual streams [..., D]: the final norm, then the vocabulary head.

        Args:
            x_BTD: the streams.
            granularity: the member whose streams they are, which may have a final norm of its own.
            linear: a head in place of the model's own.
            norm: a norm in place of the member's.
        """
        normed_BTD = self.norm(x_BTD, granularity) if norm is None else norm(x_BTD)
        return cast(Tensor, (self.lm_head if linear is None else linear)(normed_BTD))
