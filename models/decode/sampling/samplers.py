"""Samplers choose tokens from logits: the likeliest, a draw, or by noise that draft and target share.

    Greedy    compares ids and never builds a distribution
    Sampled   draws from the distributions, and keeps each q as it was drawn from, for verification
    Coupled   adds the position's own Gumbel noise to the log-probabilities and takes the largest, which is a
              draw from the distribution; the draft guesses what the target takes there. The output is so
              token for token that of plain decoding with the same seed, whatever drafts
              (Daliri, Musco and Suresh, https://arxiv.org/abs/2408.07978)

All three give the same `Verification`. T positions, V vocabulary; p target, q draft.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from models.base.errors import UsageError
from models.decode.sampling.params import SamplingParams, penalise, sampling_probs
from models.decode.sampling.rng import Random
from models.decode.sampling.verifiers import VERIFIERS, Verifier, match
from models.kernels.sample import Draws

COUPLED = "coupled"
VERIFIER_NAMES = (*VERIFIERS, COUPLED)


@dataclass
class Proposal:
    """Drafted tokens and the distributions [T, V] that they were drawn from, a few tokens at a time.

    None are kept when greedy, nor where the tokens are no draws at all but certain, as copied ones are:
    verification then takes a point mass for the distribution of each.
    """

    prefix: Sequence[int]
    """The committed tokens that these follow, from the first of the prompt."""
    ids: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def add(self, draws: Draws, rows_TV: Tensor) -> None:
        """Take over what a pass has drawn; the likeliest tokens come without probabilities."""
        self.ids += draws.ids
        if draws.temperature:
            self.probs.append(rows_TV)


@dataclass(frozen=True)
class Verification:
    """The result of verifying a proposal by one target pass."""

    kept: list[int]
    """The accepted tokens and one of the target's."""
    overlaps: list[float]
    """sum of min(p, q) at each drafted position that was reached, which means that every drafted
    token before it was kept: there p and q are distributions of the output's own prefix."""


class Sampler(Protocol):
    """Chooses the draft's tokens and verifies them."""

    def draws(self, proposal: Proposal, count: int, vocab_size: int) -> Draws | None:
        """Return what lets a pass draw the next drafted tokens itself; None leaves that to `draft`."""
        ...

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """Choose the next drafted token, append it to the proposal and return it."""
        ...

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verification:
        """Verify a proposal by the target's logits at its positions and one more."""
        ...


@dataclass(frozen=True)
class Greedy:
    """The likeliest token, the lowest id among equals."""

    params: SamplingParams

    def draws(self, proposal: Proposal, count: int, vocab_size: int) -> Draws | None:
        """See `Sampler`."""
        return None if self.params.depends_on_text else Draws(count=count)

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """See `Sampler`."""
        x_V = _draft_logits(logits_V, proposal, self.params)
        proposal.ids += _likeliest(x_V.unsqueeze(0))  # a sync: the next draft step needs it
        return proposal.ids[-1]

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verification:
        """See `Sampler`; the overlap of two certain distributions is 1 or 0."""
        x_TV = penalise(logits_TV, self.params, proposal.prefix, proposal.ids)
        kept = match(_likeliest(x_TV), proposal.ids)  # the round's only sync
        num_accepted = len(kept) - 1
        is_rejected = num_accepted < len(proposal.ids)
        return Verification(kept, [1.0] * num_accepted + [0.0] * is_rejected)


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from `sampling_probs(logits, params)`, for the draft and the target alike."""

    params: SamplingParams
    random: Random
    verifier: Verifier

    def draws(self, proposal: Proposal, count: int, vocab_size: int) -> Draws | None:
        """See `Sampler`; not for random choices that are made otherwise than by a number each."""
        if self.params.depends_on_text:
            return None
        uniforms = self.random.uniforms(count)
        return None if uniforms is None else _draws(count, self.params, uniforms=uniforms)

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """See `Sampler`."""
        q_V = _draft_probs(logits_V, proposal, self.params)
        proposal.probs.append(q_V.unsqueeze(0))
        proposal.ids.append(self.random.draft(q_V))
        return proposal.ids[-1]

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verification:
        """See `Sampler`."""
        p_TV = _target_probs(logits_TV, proposal, self.params)
        if not proposal.ids:
            return Verification([self.random.target(p_TV[0])], [])
        q_TV = _stacked_probs(p_TV, proposal)
        kept = self.verifier(p_TV, q_TV, proposal.ids, self.random)
        return Verification(kept, _overlaps(p_TV, q_TV, len(kept)))


@dataclass(frozen=True)
class Coupled:
    """The largest of log-probability plus noise, where the noise is a function of the position alone.

    Drafted tokens are kept while they are the target's own choice: each one at least with probability
    (1 - d) / (1 + d), where d is the total variation of p and q and `token` keeps 1 - d. That is the
    price of an output that does not depend on the draft.
    """

    params: SamplingParams
    random: Random

    def draws(self, proposal: Proposal, count: int, vocab_size: int) -> Draws | None:
        """See `Sampler`."""
        if self.params.depends_on_text:
            return None
        # The largest of log q + noise is that of q * e^noise.
        noise_CV = self._noise(len(proposal.prefix) + len(proposal.ids), count, vocab_size)
        return _draws(count, self.params, races_CV=noise_CV.exp())

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        """See `Sampler`."""
        q_V = _draft_probs(logits_V, proposal, self.params)
        position = len(proposal.prefix) + len(proposal.ids)
        proposal.probs.append(q_V.unsqueeze(0))
        proposal.ids += self._choose(q_V.unsqueeze(0), position)
        return proposal.ids[-1]

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verification:
        """See `Sampler`."""
        p_TV = _target_probs(logits_TV, proposal, self.params)
        kept = match(self._choose(p_TV, len(proposal.prefix)), proposal.ids)
        if not proposal.ids:
            return Verification(kept, [])
        return Verification(kept, _overlaps(p_TV, _stacked_probs(p_TV, proposal), len(kept)))

    def _choose(self, probs_TV: Tensor, position: int) -> list[int]:
        """Return the tokens at this position and the next ones."""
        # float64: in float32 close values would tie, and the lower id would win too often.
        keys_TV = probs_TV.double().log() + self._noise(position, *probs_TV.shape).to(probs_TV.device)
        tokens: list[int] = keys_TV.argmax(-1).tolist()  # a sync: the host needs the tokens
        return tokens

    def _noise(self, position: int, num_positions: int, num_tokens: int) -> Tensor:
        return torch.stack([self.random.noise(position + t, num_tokens) for t in range(num_positions)])


def make_sampler(params: SamplingParams, random: Random, verifier: str | Verifier) -> Sampler:
    """Return the sampler for these parameters.

    Args:
        params: settings of sampling.
        random: source of the random choices.
        verifier: a name in `VERIFIER_NAMES`, or a function like those of `VERIFIERS`.

    Raises:
        UsageError: if there is no verifier of this name.
    """
    if isinstance(verifier, str):
        check_verifier(verifier)
    if params.is_greedy:
        return Greedy(params)
    if verifier == COUPLED:
        return Coupled(params, random)
    return Sampled(params, random, VERIFIERS[verifier] if isinstance(verifier, str) else verifier)


def check_verifier(name: str) -> None:
    """Raise UsageError unless there is a verifier of this name."""
    if name not in VERIFIER_NAMES:
        raise UsageError(f"--verifier {name!r} is not one of {', '.join(VERIFIER_NAMES)}")


def _likeliest(x_TV: Tensor) -> list[int]:
    """Return the best token of each row, the lowest id among equals.

    >>> _likeliest(torch.tensor([[0.0, 2.0, 2.0]]))
    [1]
    """
    if x_TV.dtype == torch.float32 and x_TV.device.type == "cpu":
        tokens: list[int] = x_TV.numpy().argmax(-1).tolist()  # on a few rows ten times as fast as torch's
    else:
        tokens = x_TV.argmax(-1).tolist()
    return tokens


def _draws(count: int, params: SamplingParams, **how: Any) -> Draws:
    cuts = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return Draws(count=count, **cuts, **how)


def _draft_logits(logits_V: Tensor, proposal: Proposal, params: SamplingParams) -> Tensor:
    """Return the logits of the next drafted token, which follows the prefix and all drafted ones."""
    return penalise(logits_V.unsqueeze(0), params, chain(proposal.prefix, proposal.ids))[0]


def _draft_probs(logits_V: Tensor, proposal: Proposal, params: SamplingParams) -> Tensor:
    return sampling_probs(_draft_logits(logits_V, proposal, params), params)


def _target_probs(logits_TV: Tensor, proposal: Proposal, params: SamplingParams) -> Tensor:
    return sampling_probs(penalise(logits_TV, params, proposal.prefix, proposal.ids), params)


def _stacked_probs(p_TV: Tensor, proposal: Proposal) -> Tensor:
    """Return the probabilities [T, V] of T drafted tokens; point masses where the tokens were certain."""
    if proposal.probs:
        return torch.cat(proposal.probs) if len(proposal.probs) > 1 else proposal.probs[0]
    tokens_T1 = torch.tensor(proposal.ids, device=p_TV.device).unsqueeze(-1)
    return torch.zeros_like(p_TV[:-1]).scatter_(-1, tokens_T1, 1.0)


def _overlaps(p_TV: Tensor, q_TV: Tensor, num_reached: int) -> list[float]:
    """Return the sums of min(p, q) at the first drafted positions."""
    num_reached = min(num_reached, len(q_TV))
    overlaps: list[float] = torch.minimum(p_TV[:num_reached], q_TV[:num_reached]).sum(-1).tolist()
    return overlaps
