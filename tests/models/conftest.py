"""What the tests of decoding and of its distributions share: very small models, and bugs to be found."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from models.decode.engine import engine
from models.decode.engine.draft import Draft, Prior
from models.decode.engine.scheduler import Steps
from models.decode.engine.state import State
from models.decode.sampling.params import SamplingParams, sampling_probs
from models.decode.sampling.rng import Random
from models.decode.sampling.samplers import Proposal, Sampled, Sampler, Verification
from models.decode.sampling.verifiers import Verifier, residual
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.elastic.view import Model

TRUNCATED = SamplingParams(temperature=1.5, top_p=0.6)


@pytest.fixture
def make_model() -> Callable[..., ElasticLM]:
    """A very small model in float64, with logits far from flat; every field can be set."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: int) -> ElasticLM:
        shape = {
            "vocab_size": 3,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
        config = ElasticConfig(**(shape | fields), initializer_range=0.5)  # type: ignore[arg-type]
        model = ElasticLM(config)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.to(dtype).eval()

    return make


# ------------------------------------------------------------------ planted bugs


def buggy_verifier(
    rest: Callable[[Tensor, Tensor], Tensor] = residual,
    bonus: Callable[[Tensor, Tensor], Tensor] = lambda p_TV, _: p_TV[-1],
    acceptance: Callable[[float, float], float] = lambda p, q: min(1.0, p / q),
) -> Verifier:
    """Token verification with its parts exchangeable; without an exchange it is the right one."""

    def verify(p_TV: Tensor, q_TV: Tensor, drafted: Sequence[int], random: Random) -> list[int]:
        for t, token in enumerate(drafted):
            if not random.accept(acceptance(float(p_TV[t, token]), float(q_TV[t, token]))):
                return [*drafted[:t], random.target(rest(p_TV[t], q_TV[t]))]
        return [*drafted, random.target(bonus(p_TV, q_TV) if drafted else p_TV[-1])]

    return verify


@dataclass(frozen=True)
class DrawsByOtherRules:
    """Reports the distribution that the caller asked for, and draws from another."""

    draft: Draft
    drawn: SamplingParams

    prior = Prior()

    def check(self, target: Model) -> None:
        self.draft.check(target)

    def renew(self) -> Draft:
        return self

    def room(self, state: State) -> None:
        """Any number."""

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        assert isinstance(sampler, Sampled)
        return self.draft.propose(state, num_tokens, ReportsFalsely(sampler, self.drawn))


@dataclass(frozen=True)
class ReportsFalsely:
    asked: Sampled
    drawn: SamplingParams

    def draws(self, proposal: Proposal, count: int, vocab_size: int) -> None:
        """One by one."""

    def draft(self, logits_V: Tensor, proposal: Proposal) -> int:
        proposal.probs.append(sampling_probs(logits_V, self.asked.params).unsqueeze(0))
        proposal.ids.append(self.asked.random.draft(sampling_probs(logits_V, self.drawn)))
        return proposal.ids[-1]

    def verify(self, logits_TV: Tensor, proposal: Proposal) -> Verification:
        raise NotImplementedError


@dataclass(frozen=True)
class DiscardsByValue:
    """Drops its last token when it finds it unlikely: the tokens that stay are no draw from q."""

    draft: Draft

    prior = Prior()

    def check(self, target: Model) -> None:
        self.draft.check(target)

    def renew(self) -> Draft:
        return self

    def room(self, state: State) -> None:
        """Any number."""

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        proposal = yield from self.draft.propose(state, num_tokens, sampler)
        if float(proposal.probs[-1][-1][proposal.ids[-1]]) > 0.4:
            return proposal
        return Proposal(proposal.prefix, proposal.ids[:-1], proposal.probs[:-1])


Bug = Callable[[Draft], dict[str, Any]]
"""A draft -> options of `stream` that break the distribution."""

BUGS: dict[str, Bug] = {
    "residual := p": lambda _: {"verifier": buggy_verifier(rest=lambda p_V, _: p_V)},
    "bonus off by one": lambda _: {"verifier": buggy_verifier(bonus=lambda p_TV, _: p_TV[-2])},
    "bonus from the draft": lambda _: {"verifier": buggy_verifier(bonus=lambda _, q_TV: q_TV[-1])},
    "acceptance without q": lambda _: {"verifier": buggy_verifier(acceptance=lambda p, _: p)},
    "a 101-level uniform": lambda _: {
        "verifier": buggy_verifier(acceptance=lambda p, q: math.ceil(min(1.0, p / q) * 100) / 101)
    },
    "greedy draft, softmax q": lambda draft: {
        "draft": DrawsByOtherRules(draft, SamplingParams(temperature=0.0))
    },
    "truncated draft, raw q": lambda draft: {"draft": DrawsByOtherRules(draft, TRUNCATED)},
    "discarding by own value": lambda draft: {"draft": DiscardsByValue(draft)},
}


@pytest.fixture(params=BUGS)
def planted_bug(request: pytest.FixtureRequest) -> Bug:
    """Each of the bugs that a distribution test must see; a test that uses it runs once for each."""
    return BUGS[request.param]


@pytest.fixture
def rebuilt_verifier() -> Verifier:
    """The verifier that the bugs are planted in, without a bug."""
    return buggy_verifier()


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that counts what the engine commits."""
    num_commits, real = 0, engine.commit

    def counting(request: Any, verification: Verification, logits_TV: Tensor) -> list[engine.Token]:
        nonlocal num_commits
        num_commits += 1
        return real(request, verification, logits_TV)

    monkeypatch.setattr("models.decode.engine.engine.commit", counting)
    return lambda: float(num_commits)
