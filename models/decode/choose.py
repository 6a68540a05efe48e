"""How tokens are chosen from logits: greedily, or drawn from a law.

Greedy decoding compares ids and never builds a law; sampling keeps each q as it was drawn from, for
verification. Both give the same `Verdict`.

T positions, V vocabulary; p target, q draft.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from models.decode.accept import VERIFIERS, Verifier, match
from models.decode.chance import Random
from models.decode.sampling import SamplingParams, law
from models.errors import UsageError


@dataclass
class Proposal:
    """Drafted tokens and the laws [V] that they were drawn from (none are kept when greedy)."""

    ids: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """What one target pass decided."""

    kept: list[int]
    """The accepted tokens and one of the target's."""
    overlaps: list[float]
    """sum of min(p, q) at each drafted position that was reached, which means that every drafted
    token before it was kept: there p and q are laws of the output's own prefix."""


class Chooser(Protocol):
    """Chooses the draft's tokens and judges them."""

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """Choose the next drafted token, append it to the proposal and return it."""
        ...

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verdict:
        """Judge a proposal by the target's logits at its positions and one more."""
        ...


class Greedy:
    """The likeliest token, the lowest id among equals."""

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """See `Chooser`."""
        proposal.ids.append(int(logits_V.argmax()))  # a sync: the next draft step needs it
        return proposal.ids[-1]

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verdict:
        """See `Chooser`; the overlap of two certain laws is 1 or 0."""
        kept = match(logits_TV.argmax(-1).tolist(), proposal.ids)  # the round's only sync
        num_accepted = len(kept) - 1
        num_rejected = num_accepted < len(proposal.ids)
        return Verdict(kept, [1.0] * num_accepted + [0.0] * num_rejected)


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from `law(logits, params)`, for the draft and the target alike."""

    params: SamplingParams
    random: Random
    verifier: Verifier

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """See `Chooser`."""
        q_V = law(logits_V, self.params)
        proposal.laws.append(q_V)
        proposal.ids.append(self.random.draft(q_V))
        return proposal.ids[-1]

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verdict:
        """See `Chooser`."""
        p_TV = law(logits_TV, self.params)
        if not proposal.ids:
            return Verdict([self.random.target(p_TV[0])], [])
        q_TV = torch.stack(proposal.laws)
        kept = self.verifier(p_TV, q_TV, proposal.ids, self.random)
        overlap_T = torch.minimum(p_TV[:-1], q_TV).sum(-1)[: len(kept)]
        return Verdict(kept, overlap_T.tolist())


def make_chooser(params: SamplingParams, random: Random, verifier: str | Verifier) -> Chooser:
    """The chooser for these parameters.

    Args:
        params: how tokens are chosen.
        random: the random choices.
        verifier: a name in `VERIFIERS`, or a function like them.

    Raises:
        UsageError: if there is no verifier of this name.
    """
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            raise UsageError(f"--verifier {verifier!r} is none of {', '.join(VERIFIERS)}")
        verifier = VERIFIERS[verifier]
    return Greedy() if params.is_greedy else Sampled(params, random, verifier)
