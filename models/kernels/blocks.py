"""Weights in blocks of 32 inputs, as a GGUF file has them: Q8_0, Q4_0 and Q4_1 of llama.cpp.

A block is a scale (fp16), in Q4_1 a value that is added to each weight (fp16), and 32 codes of 8 or 4 bits:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. The tensor is one of fp32 to torch,
and dequantized by whatever operation reads it; rows that are looked up or cut out stay in blocks.

O outputs, I inputs, B blocks of a row, Y bytes of a block, S scales that are tried.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

BLOCK = 32
"""Weights of a block."""
KINDS: Mapping[str, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""Names of the formats, and the bytes of a block."""
TINY = 1e-30
ROWS_AT_ONCE = 256
"""Rows that are rounded to 4 bits at once: what is made of them on the way stays in a near cache."""
SPANS = (-8.0, -8.7, -7.6, -9.5, -7.0)
"""Codes, whole or not, of a block's largest weight, which are tried for 4 bits."""


class BlockTensor(Tensor):
    """A weight [O, I] that is kept in blocks.

    Args:
        blocks_OBY: the bytes of the file.
        kind: the format, a key of `KINDS`.

    >>> ones = BlockTensor(torch.tensor([[[0, 60, 0, 0] + [1] * 16]], dtype=torch.uint8), "Q4_1")
    >>> ones.shape, ones.dtype, ones[0, :17].tolist() == [1.0] * 16 + [0.0]
    (torch.Size([1, 32]), torch.float32, True)
    """

    blocks_OBY: Tensor
    kind: str

    @staticmethod
    def __new__(cls, blocks_OBY: Tensor, kind: str) -> "BlockTensor":
        """Make the tensor that torch sees."""
        assert blocks_OBY.dtype == torch.uint8, blocks_OBY.dtype
        assert blocks_OBY.shape[2] == KINDS[kind], (blocks_OBY.shape, kind)
        rows, count = blocks_OBY.shape[:2]
        shape: Any = torch.zeros(()).expand(rows, count * BLOCK)  # nobody reads its one number
        return Tensor._make_subclass(cls, shape)

    def __init__(self, blocks_OBY: Tensor, kind: str) -> None:
        self.blocks_OBY, self.kind = blocks_OBY, kind

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # torch's stubs say that it could be set
        """Bytes of the blocks."""
        return self.blocks_OBY.nbytes

    @property
    def scales(self) -> Tensor:
        """Scales, and in Q4_1 the values that are added, [O, B, 1 or 2] in fp32."""
        numbers = 2 if self.kind == "Q4_1" else 1
        return self.blocks_OBY[..., : 2 * numbers].contiguous().view(torch.float16).float()

    def dequantize(self) -> Tensor:
        """Return the weights in fp32, as llama.cpp's own conversion does."""
        scales = self.scales
        codes = self.blocks_OBY[..., 2 * scales.shape[-1] :]
        if self.kind == "Q8_0":
            codes_OBK = codes.contiguous().view(torch.int8).float()
        else:
            codes_OBK = torch.cat([codes & 15, codes >> 4], -1).float() - (8 if self.kind == "Q4_0" else 0)
        weight_OBK = codes_OBK.mul_(scales[..., :1])  # in place: it may be a whole vocabulary's
        return (weight_OBK.add_(scales[..., 1:]) if self.kind == "Q4_1" else weight_OBK).flatten(1)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch on dense weights, unless it keeps blocks or asks for the shape."""
        kwargs = kwargs or {}
        if func in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        in_blocks = _IN_BLOCKS.get(func)
        found = None if in_blocks is None or kwargs else in_blocks(*args)
        if found is not None:
            return found
        args, kwargs = tree_map_only(cls, cls.dequantize, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)


def _same(weight: BlockTensor) -> BlockTensor:
    return BlockTensor(weight.blocks_OBY, weight.kind)


def _part(weight: BlockTensor, key: Any) -> BlockTensor | None:
    """Return rows, or rows and whole blocks of columns; None for parts of another kind."""
    rows, columns = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
    is_row_list = isinstance(rows, Tensor) and rows.ndim == 1
    if not isinstance(columns, slice) or not (is_row_list or isinstance(rows, slice)):
        return None
    start, end, step = columns.indices(weight.shape[1])
    if start % BLOCK or end % BLOCK or step != 1:
        return None
    return BlockTensor(weight.blocks_OBY[rows, start // BLOCK : end // BLOCK], weight.kind)


def _looked_up(ids: Any, weight: Any, *_: Any) -> Tensor | None:
    if not isinstance(weight, BlockTensor):
        return None
    found: Tensor = BlockTensor(weight.blocks_OBY[ids.flatten()], weight.kind).dequantize()
    return found.reshape(*ids.shape, -1)


_OF_THE_SHAPE = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
        *(
            getattr(Tensor, name).__get__
            for name in ("requires_grad", "grad", "grad_fn", "is_meta", "is_leaf")
        ),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.requires_grad_),
        *(Tensor.__len__, Tensor.__hash__),
    }
)
_IN_BLOCKS: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.detach: _same,
    Tensor.__getitem__: _part,
    F.embedding: _looked_up,
}
"""Functions that do not need all of it in fp32; None as their result means that they do."""


def in_8_bits(weight_OI: Tensor) -> BlockTensor:
    """Return a weight in blocks of Q8_0, the last one padded with zeros, rounded as llama.cpp does.

    >>> in_8_bits(torch.tensor([[127.0, -3.0, 0.4]])).dequantize()[0, :4]
    tensor([127.,  -3.,   0.,   0.])
    """
    weight_OI = weight_OI.detach().float()
    weight_OBK = F.pad(weight_OI, (0, -weight_OI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale_OB1 = weight_OBK.abs().amax(-1, keepdim=True) / 127
    codes_OBK = torch.where(scale_OB1 > 0, weight_OBK / scale_OB1, 0.0).round().to(torch.int8)
    return BlockTensor(
        torch.cat([scale_OB1.half().view(torch.uint8), codes_OBK.view(torch.uint8)], -1), "Q8_0"
    )


def in_4_bits(weight_OI: Tensor) -> BlockTensor:
    """Return a weight in blocks of Q4_0, the last one padded with zeros.

    The largest weight of a block has the code -8 where the scale spans them all; of a few scales each block
    has the one with the least squared error.

    >>> in_4_bits(torch.tensor([[8.0, -3.0, 0.4]])).dequantize()[0, :4].tolist() == [8.0, -3.0, 0.0, 0.0]
    True
    """
    if len(weight_OI) > ROWS_AT_ONCE:
        parts = [in_4_bits(part).blocks_OBY for part in weight_OI.detach().split(ROWS_AT_ONCE)]
        return BlockTensor(torch.cat(parts), "Q4_0")
    weight_OI = weight_OI.detach().float()
    weight_OBK = F.pad(weight_OI, (0, -weight_OI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    most_OB1 = weight_OBK.gather(-1, weight_OBK.abs().argmax(-1, keepdim=True))
    scales_SOB1 = torch.stack([(most_OB1 / span).half() for span in SPANS])
    rounded = (_four_bits(weight_OBK, scale_OB1) * scale_OB1.float() for scale_OB1 in scales_SOB1)
    errors_SOB1 = torch.stack([(one - weight_OBK).square().sum(-1, keepdim=True) for one in rounded])
    scale_OB1 = scales_SOB1.gather(0, errors_SOB1.argmin(0, keepdim=True))[0]
    codes_OBK = _four_bits(weight_OBK, scale_OB1)
    lower_OBK, upper_OBK = (codes_OBK + 8).to(torch.uint8).split(BLOCK // 2, -1)
    return BlockTensor(torch.cat([scale_OB1.view(torch.uint8), lower_OBK | upper_OBK << 4], -1), "Q4_0")


def _four_bits(weight_OBK: Tensor, scale_OB1: Tensor) -> Tensor:
    """Return codes from -8 to 7."""
    return torch.where(scale_OB1 != 0, weight_OBK / scale_OB1.float(), 0.0).round().clamp(-8, 7)


def block_product(weight_OI: BlockTensor, bias_O: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Return the product that compiled code computes, by torch: from x [..., I] to fp32 [..., O].

    Each block of 32 inputs of a row has 8 bits and a scale, so that a row's result depends on no other.
    """
    dense_OI = weight_OI.dequantize()
    bias_O = None if bias_O is None else bias_O.float()

    def apply(x: Tensor) -> Tensor:
        y: Tensor = F.linear(round_inputs(x), dense_OI[:, : x.shape[-1]], bias_O)
        return y

    return apply


def round_inputs(x: Tensor) -> Tensor:
    """Return x [..., I] in fp32, each block of 32 in 8 bits: its largest number has the code 127.

    >>> round_inputs(torch.tensor([[127.0, 1.4, -0.6]]))
    tensor([[127.,   1.,  -1.]])
    """
    count = x.shape[-1]
    blocks = F.pad(x.float(), (0, -count % BLOCK)).unflatten(-1, (-1, BLOCK))
    most = blocks.abs().amax(-1, keepdim=True).clamp_min(TINY)
    codes = (blocks * (torch.full_like(most, 127) / most)).round()  # a number over a tensor rounds twice
    rounded: Tensor = (codes * (most / 127)).flatten(-2)[..., :count]
    return rounded
