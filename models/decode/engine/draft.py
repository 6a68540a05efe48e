"""Drafts propose the tokens that the target verifies. Any draft is safe; a good one is fast.

    NestedDraft   a member of the target, in place: no weights, no prefill and no cache of its own
                  (or packed in another precision: models/packed/quantize.py; the weights are then a copy).
                  Self-speculative decoding: Draft & Verify (2309.08168) skips layers, LayerSkip
                  (2404.16710) exits early; EAGLE (2401.15077) and Kangaroo (2404.18911) add layers
    ModelDraft    a model of its own, or a member that reads its own keys and values (2211.17192)

A nested draft reads the target's keys and values of the committed positions. Its own, for the few
tokens of this round, go into the tail of the same store, where verification writes next:

    position          0 1 2 3 4 | 5        6   7
    token             committed | pending  d1  d2  -> d3
    keys and values   target's  | draft's             <- the target's pass overwrites them

p target, q draft.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from models.base.errors import UsageError
from models.decode.engine.scheduler import Pass, Steps
from models.decode.engine.state import State
from models.decode.engine.trimmed_head import TrimmedHead
from models.decode.sampling.samplers import Proposal, Sampler
from models.elastic.cache import KVCache
from models.elastic.count import count_parameters
from models.elastic.view import Model, Scorer, View


class Prior(NamedTuple):
    """A controller's assumptions about a draft before its first round, where nothing was measured."""

    alpha: float = 0.8
    """Acceptance of a drafted token: high enough that every position is tried before it is given up."""
    step: float | None = None
    """Cost of a drafted token in plain steps; None where only a measurement can tell."""


class Draft(Protocol):
    """Proposes tokens that may follow a state."""

    @property
    def prior(self) -> Prior:
        """The assumptions about it before its first round."""
        ...

    def check(self, target: Model) -> None:
        """Check that this can draft for the target.

        Raises:
            UsageError: if it cannot, or if it would be of no use.
        """
        ...

    def renew(self) -> "Draft":
        """Return the draft for another request: a new one if it remembers a text, else itself."""
        ...

    def room(self, state: State) -> int | None:
        """Return how many tokens it can propose after a state; None where the text sets no limit.

        It depends on committed tokens only, so that a policy may ask before it decides.
        """
        ...

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        """Draft at most `num_tokens` tokens after the pending one; what is committed stays as it is.

        How many there are may depend on the state, never on the values of the proposed tokens: to
        drop a token because of what it is would bend the output distribution.
        """
        ...


class NestedDraft:
    """A member of the target's own weights that shares the target's key/value store.

    Args:
        view: the member, of the target or of a packed copy of it.
        vocabulary: ids of the tokens that it may draft; None means all.

    Raises:
        UsageError: if these are no token ids of the model.
    """

    prior = Prior()

    def __init__(self, view: View, vocabulary: Tensor | None = None) -> None:
        self.view = view
        head = None if vocabulary is None else TrimmedHead(view, vocabulary)
        self.scorer: Scorer = head or view
        self.num_bytes = 0 if head is None else head.num_bytes
        """Size of the trimmed head, which only this draft has."""

    def check(self, target: Model) -> None:
        """See `Draft`."""
        ours, theirs = (one.full.model.embed_tokens.weight for one in (self.view, target))
        assert ours is theirs, "a nested draft is a view of its target's weights, or of a packed copy"
        if not target.granularity.resolve(target.full.config).contains(self.view.plan):
            raise UsageError(
                f"--draft {self.view.granularity} is larger than its target {target.granularity}: "
                "it must be a part of it"
            )

    def renew(self) -> "NestedDraft":
        """See `Draft`; all that it knows is in the target's store."""
        return self

    def room(self, state: State) -> None:
        """See `Draft`."""

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        """See `Draft`."""
        return (yield from propose(self.scorer, state, state.cache.view(), num_tokens, sampler))


class ModelDraft:
    """A model of its own with the target's vocabulary; its cache follows what was committed."""

    prior = Prior()

    def __init__(self, model: Model) -> None:
        self.model = model
        self._max_positions = model.full.config.max_position_embeddings
        self._cache: KVCache | None = None
        self._cached_ids: list[int] = []

    def check(self, target: Model) -> None:
        """See `Draft`."""
        ours, theirs = self.model.full.config, target.full.config
        if ours.vocab_size != theirs.vocab_size:
            raise UsageError(
                f"--draft has a vocabulary of {ours.vocab_size} tokens and its target one of "
                f"{theirs.vocab_size}: both must come from the same tokenizer"
            )
        if _num_parameters(self.model) > _num_parameters(target):
            raise UsageError(
                f"--draft has {_num_parameters(self.model):,} parameters, more than its target's "
                f"{_num_parameters(target):,}: choose a smaller draft"
            )

    def renew(self) -> "ModelDraft":
        """See `Draft`; the cache is not shared."""
        return ModelDraft(self.model)

    def room(self, state: State) -> None:
        """See `Draft`."""

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        """See `Draft`; beyond the draft's own context it proposes nothing."""
        num_tokens = min(num_tokens, self._max_positions - len(state.ids) + 1)
        if num_tokens < 1:
            return Proposal(state.ids)
        proposal = yield from propose(self.model, state, self._rewound(state), num_tokens, sampler)
        self._cached_ids = [*state.ids, *proposal.ids[:-1]]
        return proposal

    def _rewound(self, state: State) -> KVCache:
        """Return the cache, cut back to the tokens that hold; the pending one is always fed (again)."""
        num_positions = min(state.cache.num_positions, self._max_positions)
        if self._cache is None or self._cache.num_positions < num_positions:
            self._cache, self._cached_ids = self.model.full.new_cache(num_positions), []
        self._cache.rewind(_num_shared(self._cached_ids, state.ids[:-1]))
        return self._cache


def propose(
    scorer: Scorer, state: State, cache: KVCache, num_tokens: int, sampler: Sampler
) -> Steps[Proposal]:
    """Draft token by token, after the committed tokens that the cache lacks (at least the pending one)."""
    proposal, ids = Proposal(state.ids), state.ids[cache.length :]
    draws = None
    if scorer.can_draw:
        draws = sampler.draws(proposal, num_tokens, scorer.full.config.vocab_size)
    if draws is not None:
        rows_TV = yield Pass(scorer, ids, cache, num_last=1, draws=draws, is_draft=True)
        cache.commit(len(ids) + draws.num_read)
        proposal.add(draws, rows_TV)
        return proposal
    while len(proposal.ids) < num_tokens:
        logits_TV = yield Pass(scorer, ids, cache, num_last=1, is_draft=True)
        cache.commit(len(ids))
        ids = [sampler.draft(logits_TV[0], proposal)]
    return proposal


def _num_shared(ours: list[int], theirs: list[int]) -> int:
    """Return length of the common prefix; cheap when only the last few tokens differ.

    >>> _num_shared([1, 2, 3, 4], [1, 2, 9])
    2
    """
    length = min(len(ours), len(theirs))
    while ours[:length] != theirs[:length]:
        length -= 1
    return length


def _num_parameters(model: Model) -> int:
    return count_parameters(model.full.config, model.granularity)
