"""Policies decide who drafts a round and how much, before it, from committed tokens and the clock.

A policy may look at committed tokens, at rounds that are over and at time. It never sees the tokens of
the round that it decides on, so the output distribution does not depend on it: given all that it knew, what a
round commits and what follows has the target's distribution.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from models.base.errors import UsageError
from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft
from models.decode.engine.state import State
from models.elastic.view import Model

NO_DRAFT = "none"


class RoundPlan(NamedTuple):
    """The decision on one round."""

    draft: Draft | None
    """None decodes plainly."""
    gamma: int
    """Drafted tokens; the draft may propose fewer."""
    name: str = "draft"
    """The draft's name, for the report."""


PLAIN = RoundPlan(None, 0, NO_DRAFT)


class Round(NamedTuple):
    """The outcome of one round."""

    draft: str
    """The draft's name; "none" where nothing was drafted."""
    num_drafted: int
    num_accepted: int
    """Number of drafted tokens that were kept."""
    draft_seconds: float
    """Time until the proposal was there, the policy's own included; 0 where nothing was drafted."""
    target_seconds: float
    """The target's pass over the pending and the drafted tokens, and the verification."""
    overlaps: tuple[float, ...] = ()
    """Sum of min(p, q) at each drafted position that was reached; see `Verification`."""


class Policy(Protocol):
    """Decides before each round of one request, and learns from its outcome."""

    @property
    def costs(self) -> Costs | None:
        """Costs that are known before the request begins."""
        ...

    def check(self, target: Model) -> None:
        """Check that all its drafts can draft for the target.

        Raises:
            UsageError: if one cannot.
        """
        ...

    def choose(self, state: State, most: int) -> RoundPlan:
        """Decide on the next round, with at most `most` drafted tokens (0 or more)."""
        ...

    def observe(self, done: Round) -> None:
        """Learn from the round that was chosen last."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same draft with the same number of tokens in every round."""

    draft: Draft | None
    gamma: int
    name: str = "draft"
    costs: Costs | None = None

    def check(self, target: Model) -> None:
        """See `Policy`; a negative gamma is refused too."""
        if self.gamma < 0:
            raise UsageError(f"--gamma must be 0 or more, got {self.gamma}")
        if self.draft is not None:
            self.draft.check(target)

    def choose(self, state: State, most: int) -> RoundPlan:
        """See `Policy`."""
        gamma = min(self.gamma, most)
        return PLAIN if self.draft is None or gamma < 1 else RoundPlan(self.draft, gamma, self.name)

    def observe(self, done: Round) -> None:
        """See `Policy`; there is nothing to learn."""
