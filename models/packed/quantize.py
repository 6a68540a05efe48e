"""The precision of a member: a packed copy of its weights that runs in place of the slices.

    fp32 bf16 fp16   copies in that dtype
    int8             8-bit weights, one scale a row, and 8-bit activations, one scale a token; as a target
                     it keeps its keys and values in bf16, which are finer still
    int4             4-bit weights, one scale a row, and 8-bit activations: for drafts
    q4_0             4-bit weights in blocks of 32 with a scale each, as llama.cpp's Q4_0, and the head in 8
                     bits, as its Q8_0: for drafts, too
    file             weights as they are stored: those of a GGUF file in its blocks of 32, which nothing
                     rounds again, with 8-bit activations, one scale a block and token; as a target its
                     keys and values are in bf16, too

The copy is an `ElasticLM` that shares the source's embedding, so that any granularity runs in it and a
draft made of it still reads and writes the target's key/value store, in the store's dtype. Weights are
packed when they are first used, each once. A target and a draft that is a prefix of its layers use the same
copies. Decoding runs a whole pass as one call where it can (models/packed/decode_step.py); elsewhere, and in
passes over whole rows, torch multiplies with the same codes and scales.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base.dtypes import DTYPES
from models.base.errors import UsageError
from models.elastic.cache import KVCache
from models.elastic.granularity import FULL, Granularity
from models.elastic.linear import LowRank, NestedLinear
from models.elastic.model import ElasticLM
from models.elastic.norm import RMSNorm
from models.elastic.request import Head, Request
from models.kernels.blocks import BLOCK, BlockTensor, block_product, in_4_bits, in_8_bits
from models.kernels.build import kernels_name
from models.kernels.codes import FOUR_BITS, int8_product, quantize
from models.packed.decode_step import make_decode_step

INT8 = "int8"
INT4 = "int4"
Q4_0 = "q4_0"
FILE = "file"
PRECISIONS = (*DTYPES, INT8, INT4, Q4_0)
_CODES = {INT8: torch.int8, INT4: FOUR_BITS}
_QUANTIZED = (*_CODES, Q4_0)


def split_precision(text: str) -> tuple[str, str | None]:
    """Return a granularity or folder, and the precision behind its last `@`, if there is one.

    Raises:
        UsageError: if what follows `@` is not a precision, or nothing stands before it.

    >>> split_precision("ffn=0.25@int8"), split_precision("S")
    (('ffn=0.25', 'int8'), ('S', None))
    """
    name, at, precision = text.rpartition("@")
    if not at:
        return text, None
    problems = [] if name else ["nothing stands before the @; name a member or a folder, as in S@int8"]
    if precision not in PRECISIONS:
        problems.append(f"{precision!r} is not a precision; choose from {', '.join(PRECISIONS)}")
    if problems:
        raise UsageError(f"--draft {text}: {'. '.join(problems)}")
    return name, precision


class PackedLM(ElasticLM):
    """A model that decodes from packed copies of another's weights, which it keeps by name.

    Args:
        source: the model, packed or not.
        precision: one of `PRECISIONS`, or `FILE`.

    Raises:
        UsageError: if this device or processor has no kernels for it.
    """

    def __init__(self, source: ElasticLM, precision: str) -> None:
        with torch.device("meta"):  # without memory: every tensor is the source's
            super().__init__(source.config)
        if precision in _QUANTIZED:
            _check_codes(precision, source.device)
        dtype = DTYPES.get(precision)
        self.precision = precision
        self.owned = source.owned
        to_blocks = in_4_bits if precision == Q4_0 else None
        self.decode_step = make_decode_step(source, dtype or _CODES.get(precision), to_blocks)
        self.load_state_dict(source.state_dict(keep_vars=True), assign=True)
        self.rotary, self.is_mapped = source.rotary, source.is_mapped
        self.train(source.training)
        if self.decode_step is None or dtype != source.dtype or isinstance(source, PackedLM):
            head = self.lm_head
            for module in list(self.modules()):
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(module, name, QuantizedLinear(child, precision, is_head=child is head))

        self.is_compiled = self.decode_step is not None

    @property
    def can_draw(self) -> bool:
        """See `ElasticLM.can_draw`."""
        return self.is_compiled

    @property
    def compute_dtype(self) -> torch.dtype:
        """See `ElasticLM.compute_dtype`."""
        return DTYPES.get(self.precision, torch.float32)

    @property
    def cache_dtype(self) -> torch.dtype:
        """See `ElasticLM.cache_dtype`; of a draft in place it is the target's that counts."""
        return torch.bfloat16 if self.precision in (*_QUANTIZED, FILE) else super().cache_dtype

    def run(
        self, requests: Sequence[Request], granularity: Granularity = FULL, head: Head | None = None
    ) -> Tensor:
        """See `ElasticLM.run`; it is one call of compiled code where it can be."""
        if self.decode_step is None:
            return super().run(requests, granularity, head)
        return self.decode_step(requests, granularity, head)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """See `ElasticLM.embed`."""
        return super().embed(ids) if self.decode_step is None else self.decode_step.embed(ids)

    def run_layers(self, x_TD: Tensor, cache: KVCache, num_last: int) -> Tensor:
        """See `ElasticLM.run_layers`."""
        if self.decode_step is None:
            return super().run_layers(x_TD, cache, num_last)
        return self.decode_step.run_layers(x_TD, cache, num_last)

    def score(self, x_TD: Tensor, norm: RMSNorm) -> Tensor:
        """See `ElasticLM.score`."""
        return super().score(x_TD, norm) if self.decode_step is None else self.decode_step.score(x_TD, norm)

    def head(
        self,
        x_BTD: Tensor,
        granularity: Granularity = FULL,
        linear: nn.Linear | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """See `ElasticLM.head`; logits are in the wider of the weights' and the pass's dtype."""
        logits_BTV = super().head(x_BTD, granularity, linear, norm)
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, self.dtype))


def pack(model: ElasticLM, precision: str, granularity: Granularity = FULL) -> PackedLM:
    """Return a copy of the model that runs in another precision, with the weights of one member packed.

    It shares the source's embedding and keeps its weights by name, so it can be saved and cut like the
    source. Where nothing says otherwise it computes in fp32 (int8, int4, q4_0) or in the dtype itself.

    Args:
        model: the source, packed or not.
        precision: one of `PRECISIONS`, or `FILE`.
        granularity: the member that is packed now; others are as they are used.

    Raises:
        UsageError: if this device or processor has no kernels for it, or the member does not fit.
    """
    packed = PackedLM(model, precision)
    prepare(packed, granularity)
    return packed


def prepare(model: ElasticLM, granularity: Granularity) -> int:
    """Pack a member's weights now rather than when it first decodes, if the model is packed at all.

    Returns:
        Bytes that were packed in addition to what was packed before.

    Raises:
        UsageError: if the member does not fit the model.
    """
    before = packed_bytes(model)
    if isinstance(model, PackedLM) and model.decode_step is not None:
        model.decode_step.prepare(granularity)
    else:
        device = model.device
        with torch.inference_mode():
            model(torch.zeros(1, 1, dtype=torch.long, device=device), granularity)
    return packed_bytes(model) - before


def is_in_blocks(model: ElasticLM) -> bool:
    """Return whether the weights of a model's layers are in the blocks of a file."""
    return any(isinstance(parameter, BlockTensor) for parameter in model.model.layers.parameters())


def runs_on(model: ElasticLM) -> str:
    """Name the kernels that a model's passes run on."""
    return kernels_name() if model.is_compiled else "torch's kernels"


def packed_bytes(model: ElasticLM) -> int:
    """Return the bytes of the weights packed so far, which come on top of the source's."""
    step = model.decode_step if isinstance(model, PackedLM) else None
    packed = sum(module.num_bytes for module in model.modules() if isinstance(module, QuantizedLinear))
    return packed + (0 if step is None else step.num_bytes)


class QuantizedLinear(NestedLinear):
    """A linear map that computes with copies of its weight's prefixes in another precision."""

    def __init__(self, source: nn.Linear, precision: str, *, is_head: bool = False) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        self.weight = source.weight  # the very tensors, under the same names
        self.register_parameter("bias", source.bias)
        self.precision, self.is_head = precision, is_head
        self.num_bytes = 0
        self._products: dict[tuple[int, int, LowRank | None], Callable[[Tensor], Tensor]] = {}

    def forward(self, x: Tensor, rows: int | None = None, addition: LowRank | None = None) -> Tensor:
        """See `NestedLinear.forward`; a prefix is copied when it is first used."""
        key = self.out_features if rows is None else rows, x.shape[-1], addition
        if key not in self._products:
            whole = isinstance(self.weight, BlockTensor) and addition is None  # blocks are not cut
            columns = x.shape[-1] + (-x.shape[-1] % BLOCK if whole else 0)
            self._products[key] = self._pack(*self.prefix(key[0], columns, addition))
        return self._products[key](x)

    def _pack(self, weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
        weight_OI, bias_O = weight_OI.detach(), None if bias_O is None else bias_O.detach()
        if self.precision == INT8:
            self.num_bytes += weight_OI.numel() + 4 * len(weight_OI)  # a byte a weight, four a scale
            return int8_product(weight_OI, bias_O)
        if self.precision == Q4_0:
            weight_OI = in_8_bits(weight_OI) if self.is_head else in_4_bits(weight_OI)
        if isinstance(weight_OI, BlockTensor) and self.precision in (Q4_0, FILE):
            self.num_bytes += 4 * weight_OI.numel()
            return block_product(weight_OI, bias_O)
        if self.precision == INT4:  # no product of torch's takes such weights with one scale for each output
            codes_OI, scales_O1 = quantize(weight_OI, 4)
            weight_OI = codes_OI * scales_O1
        dtype = DTYPES.get(self.precision, torch.float32)
        weight_OI = weight_OI.to(dtype).contiguous()
        self.num_bytes += weight_OI.nbytes
        return functools.partial(
            F.linear, weight=weight_OI, bias=None if bias_O is None else bias_O.to(dtype)
        )


def _check_codes(precision: str, device: torch.device) -> None:
    if device.type != "cpu":
        raise UsageError(f"{precision} runs on a CPU, and the model is on {device}; choose bf16")
