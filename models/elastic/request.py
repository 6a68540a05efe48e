"""A request to a pass of decoding: tokens that follow what a cache has committed.

N tokens that a trimmed head knows, D model, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from models.elastic.cache import KVCache
from models.kernels.sample import Draws


class Request(NamedTuple):
    """New tokens of one text, which follow what its cache has committed."""

    ids: Sequence[int]
    cache: KVCache
    num_last: int
    """Number of last tokens that are scored, 1 or more."""
    draws: Draws | None = None
    """More tokens that the pass draws and, but for the last, reads and scores; for a compiled pass."""

    @property
    def draws_from_probs(self) -> bool:
        """True if the rows of drawn tokens are probabilities, not logits."""
        return self.draws is not None and self.draws.temperature > 0

    @property
    def num_rows(self) -> int:
        """Number of rows of logits or probabilities that it is answered with."""
        return self.num_last + (0 if self.draws is None else self.draws.num_read)


class Head(NamedTuple):
    """The map that gives logits."""

    map: nn.Linear
    """Maps D to V, or to N."""
    ids_N: Tensor | None = None
    """The tokens that it scores; None means all."""
