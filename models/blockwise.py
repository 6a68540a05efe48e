"""Attention for training on a CPU: matrix products over blocks of queries.

The fused kernel that torch has for a CPU runs at a tenth of the rate of a matrix product, batched products
with a softmax in between at up to half of it (docs/LOG.md). A few rows and a block of queries at a time, so
that what lies between two products stays in the caches, and keys that no query of the block reads are left
out. The backward pass makes a block's probabilities again: memory grows with the positions, not with
their square (as in FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1).

B batch, T positions, S positions read, H query heads, G groups, K head dim; of one block N rows and groups
together, Q queries of all heads of a group, C positions read.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 64
"""Queries of a block. In smaller ones products are slow, in larger ones more of them are with masked keys."""

PIECE_BYTES = 2**21
"""Of the probabilities of a few rows' block. Larger arrays have left the caches by the time they are read."""


class _Block(NamedTuple):
    """Queries side by side, the keys that any of them reads, in runs, and what is added to their scores."""

    queries: slice
    runs: list[slice]
    bias: Tensor


def blockwise_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_TS: Tensor | None) -> Tensor:
    """Softmax attention [B, H, T, K] of each query head over its group's keys.

    Products are in the dtype of the arguments, or of autocast, their sums and the softmax in fp32.

    Args:
        q_BHTK: queries.
        k_BGSK: keys.
        v_BGSK: values.
        mask_TS: which keys each query reads, one at least; None: causal, where S == T.

    >>> q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    >>> expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.testing.assert_close(blockwise_attention(q, k, v, None), expected)
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q_BHTK.dtype
    blocks = _causal_blocks(q_BHTK.shape[2], dtype) if mask_TS is None else _blocks(mask_TS, dtype)
    # Positions of a head side by side: blocks are cut out many times.
    layout = torch.contiguous_format
    tensors = [x.to(dtype, memory_format=layout).contiguous() for x in (q_BHTK, k_BGSK, v_BGSK)]
    mixed_BHTK: Tensor = _Blockwise.apply(*tensors, blocks)  # type: ignore[no-untyped-call]
    return mixed_BHTK


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, blocks: Sequence[_Block]) -> Tensor:
        ctx.save_for_backward(q_BHTK, k_BGSK, v_BGSK)
        ctx.blocks = blocks
        mixed_BHTK = q_BHTK.new_empty(q_BHTK.transpose(1, 2).shape).transpose(1, 2)
        with torch.autocast("cpu", enabled=False):
            for rows, block in _pieces(q_BHTK, blocks):
                k_NCK, v_NCK = (_gather(x, rows, block.runs) for x in (k_BGSK, v_BGSK))
                q_NQK = q_BHTK[rows, :, block.queries].reshape(len(k_NCK), -1, k_NCK.shape[2])
                part = mixed_BHTK[rows, :, block.queries]
                part.copy_((_probabilities(q_NQK, k_NCK, block) @ v_NCK).view_as(part))
        return mixed_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTK, k_BGSK, v_BGSK = ctx.saved_tensors
        wide = torch.promote_types(k_BGSK.dtype, torch.float32)  # several blocks add to the same keys
        dq_BHTK = torch.empty_like(q_BHTK)
        dk_BGSK, dv_BGSK = (torch.zeros_like(x, dtype=wide) for x in (k_BGSK, v_BGSK))
        with torch.autocast("cpu", enabled=False):
            for rows, block in _pieces(q_BHTK, ctx.blocks):
                k_NCK, v_NCK = (_gather(x, rows, block.runs) for x in (k_BGSK, v_BGSK))
                q_NQK = q_BHTK[rows, :, block.queries].reshape(len(k_NCK), -1, k_NCK.shape[2])
                grad_NQK = grad_BHTK[rows, :, block.queries].reshape(q_NQK.shape)
                p_NQC = _probabilities(q_NQK, k_NCK, block)
                dp_NQC = grad_NQK @ v_NCK.mT
                ds_NQC = torch._softmax_backward_data(dp_NQC, p_NQC, -1, p_NQC.dtype)
                part = dq_BHTK[rows, :, block.queries]
                part.copy_(_scaled(ds_NQC, k_NCK).view_as(part))
                _scatter(dk_BGSK, rows, block.runs, _scaled(ds_NQC.mT, q_NQK))
                _scatter(dv_BGSK, rows, block.runs, p_NQC.mT @ grad_NQK)
        return dq_BHTK, dk_BGSK.to(k_BGSK.dtype), dv_BGSK.to(v_BGSK.dtype), None


@functools.lru_cache
def _causal_blocks(num_positions: int, dtype: torch.dtype) -> list[_Block]:
    """The blocks of a causal mask, which share one bias: each is the end of a longer one's rows.

    >>> one, two = _causal_blocks(BLOCK + 2, torch.float32)
    >>> one.queries, two.runs, two.bias[:, -3:]
    (slice(0, 64, None), [slice(0, 66, None)], tensor([[0., 0., -inf],
            [0., 0., 0.]]))
    """
    last = torch.arange(num_positions - BLOCK, num_positions)
    later_QS = torch.arange(num_positions) > last[:, None]
    bias_QS = torch.zeros(later_QS.shape, dtype=dtype).masked_fill_(later_QS, -torch.inf)
    found = []
    for start in range(0, num_positions, BLOCK):
        stop = min(start + BLOCK, num_positions)
        bias_QC = bias_QS[start - stop :, num_positions - stop :]
        found.append(_Block(slice(start, stop), [slice(0, stop)], bias_QC))
    return found


def _blocks(mask_TS: Tensor, dtype: torch.dtype) -> list[_Block]:
    """A mask in blocks.

    >>> mask_TS = torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 0, 1]]).bool()
    >>> (block,) = _blocks(mask_TS, torch.float32)
    >>> block.runs, block.bias
    ([slice(0, 2, None), slice(4, 5, None)], tensor([[0., 0., 0.],
            [0., -inf, 0.]]))
    """
    found = []
    for start in range(0, len(mask_TS), BLOCK):
        part_TS = mask_TS[start : start + BLOCK]
        read_S = part_TS.any(0)
        ends = F.pad(read_S.int(), (1, 1)).diff().nonzero()
        runs = [slice(*run) for run in ends.view(-1, 2).tolist()]
        bias_TC = torch.zeros(part_TS.shape, dtype=dtype).masked_fill_(~part_TS, -torch.inf)[:, read_S]
        found.append(_Block(slice(start, start + len(part_TS)), runs, bias_TC))
    return found


def _pieces(q_BHTK: Tensor, blocks: Sequence[_Block]) -> Iterator[tuple[slice, _Block]]:
    """Rows of the batch, and blocks of their queries."""
    num_rows, heads, num_positions, _ = q_BHTK.shape
    row_bytes = q_BHTK.element_size() * heads * min(BLOCK, num_positions) * num_positions
    step = max(1, PIECE_BYTES // row_bytes)
    for row in range(0, num_rows, step):
        for block in blocks:
            yield slice(row, row + step), block


def _gather(x_BGSK: Tensor, rows: slice, runs: Sequence[slice]) -> Tensor:
    return torch.cat([x_BGSK[rows, :, run] for run in runs], 2).flatten(0, 1)


def _scatter(x_BGSK: Tensor, rows: slice, runs: Sequence[slice], part_NCK: Tensor) -> None:
    """Add what belongs to the keys that `_gather` took."""
    begin = 0
    for run in runs:
        target = x_BGSK[rows, :, run]
        end = begin + target.shape[2]
        target += part_NCK[:, begin:end].unflatten(0, target.shape[:2])
        begin = end


def _probabilities(q_NQK: Tensor, k_NCK: Tensor, block: _Block) -> Tensor:
    bias_QC = block.bias.repeat(q_NQK.shape[1] // len(block.bias), 1)
    return torch.baddbmm(bias_QC, q_NQK, k_NCK.mT, alpha=q_NQK.shape[2] ** -0.5).softmax(-1)


def _scaled(left: Tensor, right: Tensor) -> Tensor:
    """The product of the gradient of scores with queries or keys, over the root of their size."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=right.shape[2] ** -0.5)
