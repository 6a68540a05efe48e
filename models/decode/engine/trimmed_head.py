"""A member whose head scores only some tokens: the rest of the vocabulary has no chance in its law.

Any law may draft, also one that is zero almost everywhere: verification makes up for it. The head is
read once for every drafted token, and in a small model it outweighs the layers of a good draft, while
a quarter of the vocabulary makes up nearly all of a text. Whether that pays is for measurement to say.

B batch, T positions, D model, N tokens that are scored, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.base.errors import UsageError
from models.elastic.cache import KVCache
from models.elastic.view import View
from models.packed.decode_step import Head, Tokens
from models.packed.quantize import PackedLM, QuantizedLinear


class FewTokens:
    """Scores like the view that it is made of; logits of all other tokens are -inf.

    Args:
        view: the member.
        ids_N: the tokens to score, each once.

    Raises:
        UsageError: if these are no token ids of the model.
    """

    def __init__(self, view: View, ids_N: Tensor) -> None:
        head, vocab_size = view.model.lm_head, view.model.config.vocab_size
        _check(ids_N, vocab_size)
        self.view, self.model = view, view.model
        self.ids_N = ids_N.to(head.weight.device)
        few = nn.Linear(head.in_features, len(ids_N), bias=False, device="meta")
        few.weight = nn.Parameter(head.weight.detach()[self.ids_N], requires_grad=False)
        self.num_bytes = few.weight.nbytes
        self.few = few
        if isinstance(head, QuantizedLinear):
            self.few = QuantizedLinear(few, head.precision)

    @property
    def chooses(self) -> bool:
        """See `ElasticLM.chooses`."""
        return self.view.chooses

    def score(self, ids: Sequence[int], cache: KVCache, *, num_last: int) -> Tensor:
        """Logits [num_last, V]; see `ElasticLM.score`."""
        whole, granularity = self.model, self.view.granularity
        if isinstance(whole, PackedLM) and whole.native is not None:
            requests = [Tokens(ids, cache, num_last)]
            return self.among_all(whole.native(requests, granularity, self.native_head))
        tokens_BT = torch.tensor([ids], device=self.ids_N.device)
        return self.head(whole.states(tokens_BT, granularity, cache)[-1][0, -num_last:])

    @property
    def native_head(self) -> Head:
        """What a compiled pass reads."""
        return Head(self.few, self.ids_N)

    def head(self, x_BTD: Tensor) -> Tensor:
        """Logits [..., V] of residual streams [..., D]."""
        few_BTN: Tensor = self.few(self.view.norm(x_BTD))
        return self.among_all(few_BTN)

    def among_all(self, few_BTN: Tensor, *, laws: bool = False) -> Tensor:
        """Logits, or laws, [..., V] from those of the tokens that are scored [..., N]."""
        others = 0.0 if laws else -math.inf
        logits_BTV = few_BTN.new_full((*few_BTN.shape[:-1], self.model.config.vocab_size), others)
        return logits_BTV.index_copy_(-1, self.ids_N, few_BTN)


def most_frequent(counts_V: Tensor, num_tokens: int) -> Tensor:
    """Ids [N] of the most frequent tokens, ascending; of equally frequent ones the lower ids.

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
