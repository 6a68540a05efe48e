"""Who drafts a round and how much: decided before the round, from what is settled and from the clock.

A policy may look at settled tokens, at rounds that are over and at time. It never sees the tokens of
the round that it decides on, so the output law does not depend on it: given all that it knew, what a
round settles and what follows has the target's law.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from models.base.errors import UsageError
from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft
from models.decode.engine.state import Model, State

NO_DRAFT = "none"


class Plan(NamedTuple):
    """What one round does."""

    draft: Draft | None
    """None decodes plainly."""
    gamma: int
    """Drafted tokens; the draft may propose fewer."""
    name: str = "draft"
    """Of the draft, for the report."""


PLAIN = Plan(None, 0, NO_DRAFT)


class Round(NamedTuple):
    """What one round did."""

    draft: str
    """The draft's name; "none" where nothing was drafted."""
    num_drafted: int
    num_accepted: int
    """Of the drafted tokens."""
    draft_seconds: float
    """Until the proposal was there, choosing who drafts included; 0 where nothing was drafted."""
    target_seconds: float
    """The target's pass over the pending and the drafted tokens, and the verdict."""
    overlaps: tuple[float, ...] = ()
    """Of the drafted positions that were reached; see `Verdict`."""


class Policy(Protocol):
    """Decides before each round of one request, and is told what came of it."""

    @property
    def costs(self) -> Costs | None:
        """What is known of the costs before the request began."""
        ...

    def check(self, target: Model) -> None:
        """Whether all its drafts can draft for the target.

        Raises:
            UsageError: if one cannot.
        """
        ...

    def choose(self, state: State, most: int) -> Plan:
        """The next round, with at most `most` drafted tokens (0 or more)."""
        ...

    def observe(self, done: Round) -> None:
        """Learn from the round that was chosen last."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same draft and as many tokens every time."""

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

    def choose(self, state: State, most: int) -> Plan:
        """See `Policy`."""
        gamma = min(self.gamma, most)
        return PLAIN if self.draft is None or gamma < 1 else Plan(self.draft, gamma, self.name)

    def observe(self, done: Round) -> None:
        """See `Policy`; there is nothing to learn."""
