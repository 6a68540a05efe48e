"""Positions of a micro-batch: those of a student, those of a chunk, and those that have a label at all.

Where the data are conversations, the answers alone have labels, and other positions need no logits: they are
left out before the vocabulary head runs, which is a good part of a step where the vocabulary is large.

N positions (of all rows, one row after the other), K those that are kept.
"""

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

Index = slice | Tensor
"""What picks positions out of an array of them."""


def within(positions: Sequence[int], span: range) -> Sequence[int]:
    """Return the ascending positions that lie in the span; where there are none, an empty range at its start.

    >>> (
    ...     within(range(1, 20, 4), range(8, 16)),
    ...     within(range(2, 4), range(8, 16)),
    ...     within([2, 9, 12], range(8, 16)),
    ... )
    (range(9, 17, 4), range(8, 8), [9, 12])
    """
    part = positions[bisect_left(positions, span.start) : bisect_left(positions, span.stop)]
    return part or range(span.start, span.start)


def index_of(part: Sequence[int], start: int) -> Index:
    """Return what picks a student's positions out of a chunk that begins at `start`.

    >>> index_of(range(9, 17, 4), 8), index_of([9, 12], 8)
    (slice(1, 9, 4), tensor([1, 4]))
    """
    if isinstance(part, range):
        return slice(part.start - start, part.stop - start, part.step)
    return torch.tensor(part) - start


def kept_of(positions: range, is_kept_N: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Return which of a student's positions are kept, and their numbers among all that are.

    >>> kept_of(range(0, 6, 2), torch.tensor([True, False, False, True, True, True]))
    (tensor([ True, False,  True]), [0, 2])
    >>> kept_of(range(3, 6), torch.tensor([True, False, False, True, True, True]))
    (tensor([True, True, True]), range(1, 4))
    """
    mine = slice(positions.start, positions.stop, positions.step)
    is_kept_P, number_N = is_kept_N[mine], is_kept_N.cumsum(0) - 1
    numbers: list[int] = number_N[mine][is_kept_P].tolist()
    if positions.step == 1 and numbers:
        return is_kept_P, range(numbers[0], numbers[-1] + 1)
    return is_kept_P, numbers


def rows_of(here: Index, num_positions: int) -> list[tuple[int, Index]]:
    """Return the rows that hold some positions, in order, and which positions of each row these are.

    >>> rows_of(slice(3, 9), 4)
    [(0, slice(3, 4, None)), (1, slice(0, 4, None)), (2, slice(0, 1, None))]
    >>> rows_of(torch.tensor([1, 3, 10]), 4)
    [(0, tensor([1, 3])), (2, tensor([2]))]
    """
    if isinstance(here, slice):
        rows = range(here.start // num_positions, -(-here.stop // num_positions))
        spans = [range(row * num_positions, (row + 1) * num_positions) for row in rows]
        each = [within(range(here.start, here.stop), span) for span in spans]
        parts = zip(rows, each, spans, strict=True)
        return [(row, slice(part[0] - span.start, part[-1] + 1 - span.start)) for row, part, span in parts]
    row_K, place_K = here.cpu() // num_positions, here.cpu() % num_positions
    return [(int(row), place_K[row_K == row]) for row in row_K.unique()]
