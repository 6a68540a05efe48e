"""A stream of tokens as rows for training; nothing is copied before a batch is needed.

    stream   eos  a  b  c eos  d  e eos  f  g           T = 4
    row 0   [eos  a  b  c eos]                          labels  a b c eos
    row 1               [eos  d  e eos  f]              labels  d e eos f
    row 2                               [f  g  .  .  .] labels  g, then -100

Neighbours share one token: the last label of a row is the first input of the next. So every token but
the leading eos is a label exactly once: nothing is lost, nothing is seen twice. Of a conversation, only the
tokens of answers are labels, likewise exactly once.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base.labels import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of a stream.

    Args:
        stream: token ids; the first one is input only.
        sequence_length: T, positions in a row.
        is_label: which tokens are predicted; None: all but the first.
    """

    stream: NDArray[Any]
    sequence_length: int
    is_label: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return math.ceil((len(self.stream) - 1) / self.sequence_length)

    @functools.cached_property
    def num_labels(self) -> int:
        """Tokens to predict, over all rows."""
        return len(self.stream) - 1 if self._labels_of_rows is None else int(self._labels_of_rows.sum())

    @functools.cached_property
    def _labels_of_rows(self) -> NDArray[np.int64] | None:
        """The number of labels in each row, and 0 for the row past the end."""
        if self.is_label is None:
            return None
        starts = np.arange(len(self)) * self.sequence_length
        counts = np.add.reduceat(self.is_label[1:], starts, dtype=np.int64) if len(self) else starts
        return np.append(counts, 0)

    def gather(self, ids_B: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of some rows.

        Args:
            ids_B: row numbers; one past the end gives a row without labels.

        Returns:
            tokens_BT and labels_BT, int64; where there is no label, -100 and the stream's first token.
        """
        index_BS = ids_B[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        inside_BS = index_BS < len(self.stream)
        token_BS = self.stream[np.where(inside_BS, index_BS, 0)].astype(np.int64)
        is_label_BS = inside_BS
        if self.is_label is not None:
            is_label_BS = inside_BS & self.is_label[np.where(inside_BS, index_BS, 0)]
        labels_BT = np.where(is_label_BS[:, 1:], token_BS[:, 1:], IGNORE_INDEX)
        return torch.from_numpy(token_BS[:, :-1].copy()), torch.from_numpy(labels_BT)

    def count_labels(self, ids: NDArray[np.int64]) -> int:
        """Return the number of labels in some rows, without reading them."""
        if self._labels_of_rows is not None:
            return int(self._labels_of_rows[ids].sum())
        left = self.num_labels - ids * self.sequence_length
        return int(np.clip(left, 0, self.sequence_length).sum())


def document_starts(stream: NDArray[Any], num_tokens: int, most: int) -> NDArray[np.int64]:
    """Return the first tokens [documents, num_tokens] of documents that are longer, from all over a stream.

    Args:
        stream: token ids; the first one is the end of a document, as is that of each.
        num_tokens: to take of each.
        most: documents to take.

    >>> document_starts(np.array([0, 5, 6, 7, 0, 5, 6, 0, 8, 9, 7, 7, 0]), 2, most=9).tolist()
    [[5, 6], [8, 9]]
    """
    ends = np.flatnonzero(stream == stream[0])
    starts = ends[:-1] + 1
    starts = starts[np.diff(ends) - 1 > num_tokens]
    starts = starts[np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(int)]
    first_DT: NDArray[np.int64] = stream[starts[:, None] + np.arange(num_tokens)].astype(np.int64)
    return first_DT


def hold_out_tail(stream: NDArray[Any], fraction: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cut the last tokens off for validation: for a corpus that is one document.

    The first token of the second part is input only, so that every label stays in exactly one part.

    >>> hold_out_tail(np.arange(6), 0.4)
    (array([0, 1, 2, 3]), array([3, 4, 5]))
    """
    num_labels = len(stream) - 1
    num_valid = min(max(round(num_labels * fraction), 1), num_labels - 1)
    cut = len(stream) - max(num_valid, 0)
    return stream[:cut], stream[cut - 1 :]
