"""Prompt lookup: a draft without a model, which copies what followed the last few tokens before.

The longest ending of the text that occurred in it before is looked up, at its latest occurrence, and what
stood behind it is proposed. A copy may run into itself, so that a text that repeats itself is continued
for as long as one likes:

    a b c a b c a b | c a b c ...      the last tokens `c a b` occurred 3 positions before

Its tokens are certain, no draw: q is a point mass at each, which every verifier takes like any other
distribution (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from models.decode.engine.draft import Prior
from models.decode.engine.scheduler import Steps
from models.decode.engine.state import State
from models.decode.sampling.samplers import Proposal, Sampler
from models.elastic.view import Model


class LookupDraft:
    """Copies from the committed text of one request; another request resets it.

    Args:
        longest: the most tokens that are looked up.
        shortest: the fewest; a single token says little about what follows it.
    """

    # Nothing is computed; and members, whose acceptance is known, should be tried first.
    prior = Prior(alpha=0.5, step=0.0)

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        self._longest, self._shortest = longest, shortest
        self._ids: list[int] = []
        self._num_indexed = 0
        self._ends: dict[tuple[int, ...], int] = {}

    def check(self, target: Model) -> None:
        """See `Draft`; a text can always be copied."""

    def renew(self) -> "LookupDraft":
        """See `Draft`; a new one indexes its own text."""
        return LookupDraft(longest=self._longest, shortest=self._shortest)

    def room(self, state: State) -> int:
        """See `Draft`: none where the last tokens are new, else without end."""
        return 0 if self._source(state) is None else state.cache.num_positions

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        """See `Draft`; the proposal keeps no distributions, since nothing was drawn."""
        yield from ()  # no pass is needed
        source = self._source(state)
        if source is None:
            return Proposal(state.ids)
        distance = len(state.ids) - source
        # A copy longer than the distance goes on with its own first tokens.
        period = state.ids[source : source + num_tokens]
        return Proposal(state.ids, [period[position % distance] for position in range(num_tokens)])

    def _source(self, state: State) -> int | None:
        """Return where the copy starts: after the latest earlier occurrence of the longest known ending."""
        self._index(state.ids)
        for length in range(min(self._longest, len(state.ids)), self._shortest - 1, -1):
            end = self._ends.get(tuple(state.ids[-length:]))
            if end is not None:
                return end
        return None

    def _index(self, ids: list[int]) -> None:
        """Note what ends before each token but the first; only newly committed tokens are read."""
        if ids is not self._ids or len(ids) < self._num_indexed:
            self._ids, self._num_indexed, self._ends = ids, 0, {}
        for end in range(self._num_indexed + 1, len(ids)):
            for length in range(self._shortest, min(self._longest, end) + 1):
                self._ends[tuple(ids[end - length : end])] = end
        self._num_indexed = max(len(ids) - 1, 0)
