"""A member whose head scores some tokens only: a trimmed vocabulary (https://arxiv.org/abs/2502.14856).

Any distribution may draft, also one that is zero almost everywhere: verification makes up for it. The head is
read once for every drafted token, and in a small model it outweighs the layers of a good draft, while
a quarter of the vocabulary makes up nearly all of a text. Measurement says whether that pays.

T rows, D model, N tokens that are scored, V vocabulary.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from models.base.errors import UsageError
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Head, Request
from models.elastic.view import View
from models.packed.quantize import QuantizedLinear


class TrimmedHead:
    """A `Scorer` like the view that it is made of; logits of all other tokens are -inf.

    Args:
        view: the member.
        ids_N: the tokens to score, each once.

    Raises:
        UsageError: if these are no token ids of the model.
    """

    def __init__(self, view: View, ids_N: Tensor) -> None:
        head = view.model.lm_head
        _check(ids_N, view.model.config.vocab_size)
        self.view = view
        self.ids_N = ids_N.to(head.weight.device)
        rows: nn.Linear = nn.Linear(head.in_features, len(ids_N), bias=False, device="meta")
        rows.weight = nn.Parameter(head.weight.detach()[self.ids_N], requires_grad=False)
        self.num_bytes = rows.weight.nbytes
        if isinstance(head, QuantizedLinear):
            rows = QuantizedLinear(rows, head.precision)
        self._head = Head(rows, self.ids_N)

    @property
    def full(self) -> ElasticLM:
        """See `Scorer`."""
        return self.view.full

    @property
    def granularity(self) -> Granularity:
        """See `Scorer`."""
        return self.view.granularity

    @property
    def key(self) -> int:
        """See `Scorer`; others have other tokens."""
        return id(self)

    @property
    def can_draw(self) -> bool:
        """See `Scorer`."""
        return self.view.can_draw

    def run(self, requests: Sequence[Request]) -> Tensor:
        """See `Scorer`; of tokens that are drawn greedily the rows are [T, N], since nobody reads them."""
        rows_TN = self.full.run(requests, self.granularity, self._head)
        if all(one.draws is not None and not one.draws_from_probs for one in requests):
            return rows_TN
        return self._scatter(rows_TN, 0.0 if _are_probs(requests) else -math.inf)

    def head(self, x_TD: Tensor) -> Tensor:
        """Return logits [T, V] of residual streams [T, D]."""
        return self._scatter(self.full.head(x_TD, self.granularity, self._head.map), -math.inf)

    def _scatter(self, rows_TN: Tensor, others: float) -> Tensor:
        """Return rows [T, V] with one value for all tokens that are not scored."""
        rows_TV = rows_TN.new_full((*rows_TN.shape[:-1], self.full.config.vocab_size), others)
        return rows_TV.index_copy_(-1, self.ids_N, rows_TN)


def _are_probs(requests: Sequence[Request]) -> bool:
    """Return whether all rows are probabilities: drafts of a batch are alike in that."""
    found = {one.draws_from_probs and one.num_last == 1 for one in requests}
    assert len(found) == 1, requests
    return found.pop()


def most_frequent(counts_V: Tensor, num_tokens: int) -> Tensor:
    """Return ids [N] of the most frequent tokens, ascending; of equally frequent ones the lower ids.

    >>> import torch
    >>> most_frequent(torch.tensor([3, 1, 0, 3, 2]), 3).tolist()
    [0, 3, 4]
    """
    return counts_V.argsort(descending=True, stable=True)[:num_tokens].sort().values


def _check(ids_N: Tensor, vocab_size: int) -> None:
    found = sorted(set(ids_N.tolist()))
    if not found or len(found) != len(ids_N) or found[0] < 0 or found[-1] >= vocab_size:
        raise UsageError(
            f"vocabulary: {len(ids_N)} token ids, {len(found)} of them different, are none of a model "
            f"that knows {vocab_size}; give different ids from 0 to {vocab_size - 1}"
        )
