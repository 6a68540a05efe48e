"""Means over the tokens of a text, whatever is measured.

Sums over tokens are kept in float64 and divided once by the number of valid tokens, so that batches,
their order and ignored positions do not matter. The vocabulary head runs over a few rows at a time:
no [tokens, vocabulary] tensor of a whole batch is ever held.

B batch, T positions, N valid positions, D model, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.base.labels import IGNORE_INDEX
from models.elastic.view import Model

Batches: TypeAlias = Iterable[tuple[Tensor, Tensor]]
"""Token ids and labels, both [B, T]; the label of a position is the next token, or `IGNORE_INDEX`."""
Progress: TypeAlias = Callable[[], object]
"""Called after each batch."""

CHUNK_NUMBERS = 2**22
"""Numbers in the largest [N, V] tensor; several of that size live at once."""


def exact_logits(model: Model, x_ND: Tensor) -> Tensor:
    """Return logits [N, V] in fp32 or better, whatever the model runs in."""
    logits_NV = model.head(x_ND)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def select_valid(labels_BT: Tensor, states: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the labels [N] of positions that have one, and each of the states [B, T, D] there: [N, D]."""
    is_valid_BT = labels_BT != IGNORE_INDEX
    return labels_BT[is_valid_BT], [x_BTD[is_valid_BT] for x_BTD in states]


def row_chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """Return slices that cover the rows; each has a bounded number of logits.

    >>> list(row_chunks(5, CHUNK_NUMBERS // 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, CHUNK_NUMBERS // vocab_size)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def to_perplexity(loss: float) -> float:
    """Return exp(loss), infinite where a float cannot hold it.

    >>> to_perplexity(0.0), to_perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def check_some(num_tokens: int) -> int:
    """Return the number of tokens, if there are any.

    Raises:
        NestlingError: if there is nothing to divide by.
    """
    if num_tokens == 0:
        raise NestlingError("evaluation: the text has no token to predict; give a longer one")
    return num_tokens
