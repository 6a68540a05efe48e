"""A pass of an elastic model over a few tokens, as one call of models/kernels/decode_step.c.

A pass on one token reads every weight once. Run operation by operation it spends more time between the
products than the products take in a small model, and half of it in one of 350M parameters. Here a pass is
one call: threads go through the layers in step, nothing is allocated between products, and a member of the
family is a shorter list of layers, heads and neurons over the same packed weights.

A token's result is the same bits in any pass: alone or with others, drafted, verified or prefilled. So
greedy decoding gives the same tokens with any draft in bf16 too, as does coupled sampling.

T tokens that are scored, V vocabulary, N tokens of a head that knows only some, D model.
"""

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.base.mapped import forget_pages, trim_memory
from models.elastic.cache import KVCache
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity, LayerPlan
from models.elastic.linear import LowRank
from models.elastic.model import Block, ElasticLM
from models.elastic.norm import RMSNorm
from models.elastic.owned import NOTHING, OwnedLayer
from models.elastic.request import Head, Request
from models.kernels.blocks import BLOCK, BlockTensor, in_8_bits
from models.kernels.build import library
from models.kernels.pack import BLOCK_TYPES, TYPES, Map, Panels, make_panels
from models.packed.structs import MAPS, LayerStruct, ModelStruct, RequestStruct

COMPUTED = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("rope_theta", "rope_scaling"),  # whose tables it is given
        "no_rope_layers",
        *("tie_word_embeddings", "attention_bias", "qk_norm"),
    }
)
"""Fields of a configuration that decode_step.c computes, whatever their value."""
UNRELATED = frozenset({"initializer_range", "bos_token_id", "eos_token_id"})
"""Fields that do not change what a pass computes."""
LEFT_TO_TORCH = frozenset(
    {
        *("layer_types", "sliding_window", "rope_local_base_freq", "query_pre_attn_scalar"),
        *("hidden_act", "post_norms", "norm_offset", "scale_embeddings"),
    }
)
"""Fields of Gemma 3, whose models run on torch's kernels."""


class DecodeStep:
    """A compiled pass over members of one model, in one dtype of weights; see `make_decode_step`."""

    def __init__(
        self,
        model: ElasticLM,
        dtype: torch.dtype | None,
        compiled: ctypes.CDLL,
        to_blocks: Callable[[Tensor], BlockTensor] | None = None,
    ) -> None:
        self._model, self._dtype, self._run = model, dtype, compiled.nestling_step
        self._to_blocks = to_blocks
        self._panels: dict[tuple[int, str, LowRank | None], Panels] = {}
        self._heads: dict[nn.Linear, Panels] = {}
        self._norms: dict[RMSNorm, Tensor] = {}
        self._members: dict[tuple[Granularity, nn.Linear], _Member] = {}
        self._body: _Member | None = None
        self._angles: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights packed so far."""
        return sum(panels.num_bytes for panels in (*self._panels.values(), *self._heads.values()))

    def prepare(self, granularity: Granularity) -> None:
        """Pack a member's weights now rather than when it first runs.

        Raises:
            UsageError: if the member does not fit the model.
        """
        self._member(granularity, Head(self._model.lm_head))

    def __call__(
        self, requests: Sequence[Request], granularity: Granularity, head: Head | None = None
    ) -> Tensor:
        """Write the keys and values of all tokens, and return rows [all T, V or N] in fp32; see `Scorer`.

        T of a request are its `num_rows`. Where a token is drawn by sampling, its row holds probabilities.

        Args:
            requests: each with a cache of its own, of one row.
            granularity: the member.
            head: None is the model's.

        Raises:
            UsageError: if the member does not fit the model.
            IndexError: for a number that is not a token id.
        """
        head = head or Head(self._model.lm_head)
        member = self._member(granularity, head)
        tokens = self._checked([token for one in requests for token in one.ids])
        return self._pass(member.model, requests, tokens, head.map.out_features)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return what enters the first layer [T, D], in fp32."""
        model = self._ends()
        model.num_outputs = 0
        return self._between(model, self._checked(ids), self._no_cache(len(ids)), len(ids))

    def run_layers(self, x_TD: Tensor, cache: KVCache, num_last: int) -> Tensor:
        """Return what leaves the last layer [num_last, D] where `x_TD`, in fp32, enters the first one."""
        if self._body is None:
            self._body = self._make(FULL, None)
        model = ModelStruct.from_buffer_copy(self._body.model)
        return self._between(model, x_TD, cache, num_last)

    def score(self, x_TD: Tensor, norm: RMSNorm) -> Tensor:
        """Return logits [T, V] of what leaves the last layer, by a final norm and the full model's head."""
        model = self._ends()
        model.norm = self._norm(norm)
        return self._between(model, x_TD, self._no_cache(len(x_TD)), len(x_TD))

    def _ends(self) -> ModelStruct:
        """Return the full model's struct without its layers."""
        model = ModelStruct.from_buffer_copy(self._member(FULL, Head(self._model.lm_head)).model)
        model.num_layers = 0
        return model

    def _no_cache(self, num_positions: int) -> KVCache:
        return KVCache(self._model.config, num_positions=num_positions, num_layers=0)

    def _between(
        self, model: ModelStruct, given: Sequence[int] | Tensor, cache: KVCache, num_last: int
    ) -> Tensor:
        """Run a part of a pass, from ids or from residual streams on."""
        ids: Sequence[int] = range(len(given))
        if isinstance(given, Tensor):  # they are read as rows of an embedding
            model.embedding, model.embeddings = TYPES[torch.float32], given.data_ptr()
        else:
            ids = given
        width = model.num_outputs or model.hidden
        return self._pass(model, [Request(ids, cache, num_last)], ids, width)

    def _checked(self, ids: Sequence[int]) -> Sequence[int]:
        size = self._model.config.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            raise IndexError(f"token ids must be from 0 to {size - 1}, got {ids}")
        return ids

    def _pass(
        self, model: ModelStruct, requests: Sequence[Request], tokens: Sequence[int], width: int
    ) -> Tensor:
        """Run the struct of a model; the rows have `width` numbers."""
        config = self._model.config
        model.cache = TYPES[requests[0].cache.dtype]
        longest = max(one.cache.length + len(one.ids) + one.num_rows for one in requests)
        model.cosines, model.sines = (table_TK.data_ptr() for table_TK in self._tables(longest))
        given = (RequestStruct * len(requests))()
        for one, request in zip(given, requests, strict=True):
            ids, cache, num_last, draws = request
            end = cache.length + len(ids) + request.num_rows - num_last
            assert end <= min(cache.num_positions, config.max_position_embeddings), end
            assert cache.batch_size == 1, cache.batch_size
            one.keys, one.values = cache.addresses
            one.positions, one.length = cache.num_positions, cache.length
            one.count, one.scored = len(ids), num_last
            if draws is not None:
                one.num_draws, one.sampling = draws.count, draws.as_struct()
                one.chosen = (ctypes.c_int64 * draws.count)()
        rows_TV = torch.empty(sum(one.num_rows for one in requests), width)
        failed = self._run(
            ctypes.byref(model),
            given,
            len(requests),
            (ctypes.c_int64 * len(tokens))(*tokens),
            torch.get_num_threads(),
            ctypes.c_void_p(rows_TV.data_ptr()),
        )
        if failed:
            raise MemoryError("a decoding step found no memory")
        for one, request in zip(given, requests, strict=True):
            if request.draws is not None:
                request.draws.ids[:] = one.chosen[: request.draws.count]
        return rows_TV

    def _member(self, granularity: Granularity, head: Head) -> "_Member":
        key = granularity, head.map
        member = self._members.get(key)
        if member is None:
            member = self._members[key] = self._make(granularity, head)
        return member

    def _make(self, granularity: Granularity, head: Head | None) -> "_Member":
        """Return the C struct of a member, but for the dtype of the cache, which comes with each pass.

        Without a head passes give the residual streams, and the head's weights are not packed.
        """
        source, config = self._model, self._model.config
        plans, parts = granularity.resolve(config).layers, source.parts(granularity)
        kept: list[object] = []
        owns = [NOTHING if parts is None else parts.layer(plan.index) for plan in plans]
        layers = (LayerStruct * len(plans))(
            *(self._layer(*one, kept) for one in zip(plans, owns, strict=True))
        )
        embedding, embedding_type = _stored(source.model.embed_tokens.weight)
        outputs = None
        if head is not None and head.map not in self._heads:
            weight_OI: Tensor = head.map.weight
            weight_OI = weight_OI if self._to_blocks is None else in_8_bits(weight_OI)
            self._heads[head.map] = make_panels(weight_OI, dtype=self._dtype)
            self._forget(head.map.weight)
        if head is not None and head.ids_N is not None:
            outputs = head.ids_N.to(torch.int64, copy=True).contiguous()
        model = ModelStruct(
            embedding=embedding_type,
            hidden=config.hidden_size,
            head_dim=config.head_dim,
            heads_per_group=config.heads_per_group,
            query_width=config.num_attention_heads * config.head_dim,
            ffn=config.intermediate_size,
            num_layers=len(plans),
            num_outputs=0 if head is None else head.map.out_features,
            epsilon=config.rms_norm_eps,
            embeddings=embedding.data_ptr(),
            outputs=None if outputs is None else outputs.data_ptr(),
            norm=self._norm((parts and parts.norm) or source.model.norm),
            head=layers[0].query if head is None else _map(self._heads[head.map], kept),
            layers=layers,
        )
        return _Member(model, [*kept, embedding, outputs, layers])

    def _tables(self, num_positions: int) -> list[Tensor]:
        """Return cosines and signed sines in fp32 of as many positions, or of the whole context."""
        rotary = self._model.rotary
        if not self._angles or len(self._angles[0]) < num_positions:
            rotary.reach(num_positions)
            self._angles = [table_TK.float().contiguous() for table_TK in (rotary.cos_TK, rotary.sin_TK)]
        return self._angles

    def _layer(self, plan: LayerPlan, own: OwnedLayer, kept: list[object]) -> LayerStruct:
        block = cast(Block, self._model.model.layers[plan.index])
        shapes = plan.shapes(self._model.config)
        maps = {name: self._pack(plan, name, own, *shapes[f"{path}.weight"]) for name, path in MAPS.items()}
        return LayerStruct(
            **{name: _map(panels, kept) for name, panels in maps.items()},
            attention_norm=self._norm(own.input_layernorm or block.input_layernorm),
            ffn_norm=self._norm(own.post_attention_layernorm or block.post_attention_layernorm),
            query_norm=self._norm(own.self_attn.q_norm or block.self_attn.q_norm),
            key_norm=self._norm(own.self_attn.k_norm or block.self_attn.k_norm),
            index=plan.index,
            groups=plan.groups,
            ffn=plan.ffn,
            rotates=self._model.config.rotates(plan.index),
        )

    def _pack(self, plan: LayerPlan, name: str, own: OwnedLayer, rows: int, columns: int) -> Panels:
        """Return panels of at least this prefix; what is packed already serves smaller ones.

        A member that adds to the matrix has panels of its own.
        """
        part, _, short = MAPS[name].rpartition(".")
        addition = cast("LowRank | None", getattr(own.get_submodule(part), short))
        block = cast(Block, self._model.model.layers[plan.index])
        linear = cast(nn.Linear, block.get_submodule(MAPS[name]))
        keeps = self._dtype is None and isinstance(linear.weight, BlockTensor) and self._to_blocks is None
        to_blocks = in_8_bits if keeps and addition is not None else self._to_blocks  # as all of a layer are
        if keeps and addition is None:
            columns += -columns % BLOCK
        key = plan.index, name, addition
        packed = self._panels.get(key)
        if packed is None or packed.rows < rows or packed.columns < columns:
            if packed is not None:
                rows, columns = max(rows, packed.rows), max(columns, packed.columns)
                self._members.clear()  # they read the old panels
            bias_O: Tensor | None = linear.bias  # torch's stubs say that it is always there
            weight_OI = linear.weight[:rows, :columns]
            if addition is not None:
                weight_OI = addition.add_to(weight_OI)
            packed = self._panels[key] = make_panels(
                weight_OI if to_blocks is None else to_blocks(weight_OI),
                None if bias_O is None else bias_O[:rows],
                dtype=self._dtype,
                head_dim=self._model.config.head_dim if name in {"query", "key", "value"} else 0,
            )
            self._forget(linear.weight)
        return packed

    def _forget(self, weight: Tensor) -> None:
        """Give back the memory of a mapped weight that was packed."""
        if self._model.is_mapped:
            forget_pages(weight.blocks_OBY if isinstance(weight, BlockTensor) else weight.detach())
            trim_memory()

    def _norm(self, norm: RMSNorm | None) -> int | None:
        if norm is None:
            return None
        if norm not in self._norms:
            self._norms[norm] = norm.weight.detach().float().contiguous()
        return self._norms[norm].data_ptr()


class _Member(NamedTuple):
    model: ModelStruct
    kept: list[object]
    """The objects that own what the addresses in `model` point to."""


def make_decode_step(
    model: ElasticLM, dtype: torch.dtype | None, to_blocks: Callable[[Tensor], BlockTensor] | None = None
) -> DecodeStep | None:
    """Return a compiled pass for the model in a dtype of weights, int8 and int4 among them, or None.

    Without a dtype each weight keeps its own, or its blocks; all layers have the same. Or `to_blocks` makes
    blocks of them, and the head is in blocks of 8 bits: its rounding changes likelihoods most.

    Only torch's kernels run on a GPU, in fp16 and fp64, where nothing could be compiled, and for
    configurations that decode_step.c does not know.
    """
    stored = (torch.float32, torch.bfloat16)
    fits = (dtype is None or dtype in TYPES) and model.dtype in stored and model.device.type == "cpu"
    compiled = library() if fits and supports(model.config) else None
    return None if compiled is None else DecodeStep(model, dtype, compiled, to_blocks)


def supports(config: ElasticConfig) -> bool:
    """Return whether decode_step.c computes what this configuration asks for.

    A field that is on neither list is unknown to it: any value but the default, which stands for a model
    without that feature, leaves the model to torch, so that a new field is never ignored in silence.
    """
    unknown = (
        field.name
        for field in dataclasses.fields(config)
        if field.name not in COMPUTED | UNRELATED and getattr(config, field.name) != field.default
    )
    return config.hidden_size % 2 == 0 and not any(unknown)


def _stored(weight: Tensor) -> tuple[Tensor, int]:
    """Return what holds an embedding's numbers, whatever becomes of the model, and its type."""
    if isinstance(weight, BlockTensor):
        return weight.blocks_OBY.contiguous(), BLOCK_TYPES[weight.kind]
    return weight.detach(), TYPES[weight.dtype]


def _map(panels: Panels, kept: list[object]) -> Map:
    kept.append(panels)
    return panels.as_map()
