"""Drafts of the distribution tests: members, another model, copied text, an adversarial model.

A test names a draft. It is made for a target, which may hold a few of the model's tokens only, and is new
for each request.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch

from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.drafters import DRAFTERS
from models.decode.engine.policy import Fixed, Policy, Round, RoundPlan
from models.decode.engine.state import State
from models.decode.tune.controller import Controller
from models.decode.tune.predict import MAX_GAMMA
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import Model, View
from models.packed.quantize import pack
from models.verify.restrict import restrict

MakeDraft: TypeAlias = Callable[[], Draft]
"""A new draft for each request: one of its own keeps the last request's text."""


class Subject(NamedTuple):
    """The subject of a test: the target that a draft is made for."""

    target: ElasticLM
    view: Callable[[ElasticLM, Granularity], View]
    """Makes the view of a member of a model."""
    tokens: Sequence[int]
    """Tokens of the whole model that are the target's 0, 1, ..."""


ForModel: TypeAlias = Callable[[Subject], MakeDraft]
Gamma: TypeAlias = int | Literal["auto"]

ADVERSARIAL = "adversarial"
AUTO: Literal["auto"] = "auto"
ANY = "any"
"""The controller's choice among all drafts of a test."""


def member(
    granularity: Granularity, precision: str | None = None, vocabulary: Sequence[int] | None = None
) -> ForModel:
    """Return what makes a member of the target in place, or packed in a precision, for some tokens or all."""

    def of(subject: Subject) -> MakeDraft:
        target = subject.target
        source = target if precision is None else pack(target, precision, granularity)
        seen = subject.view(source, granularity)
        ids = None if vocabulary is None else torch.tensor(vocabulary)
        return lambda: NestedDraft(seen, ids)

    return of


def separate(other: ElasticLM, precision: str | None = None) -> ForModel:
    """Return what makes another model over the target's tokens, in its dtype or packed in a precision."""

    def of(subject: Subject) -> MakeDraft:
        target = subject.target
        source = restrict(other, subject.tokens, target.dtype).to(target.device)
        seen = subject.view(source if precision is None else pack(source, precision, FULL), FULL)
        return lambda: ModelDraft(seen)

    return of


def registered(name: str) -> ForModel:
    """Return what makes one of `DRAFTERS`, such as copies of earlier text."""
    return lambda subject: partial(DRAFTERS[name], subject.target)


def adversarial(subject: Subject) -> MakeDraft:
    """Return what makes a very small model of its own, which knows nothing and is sure of it."""
    target = subject.target
    config = ElasticConfig(
        vocab_size=target.config.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=target.config.max_position_embeddings,
        initializer_range=0.5,
    )
    adversary = ElasticLM(config)
    adversary.init_weights(torch.Generator().manual_seed(99))
    seen = subject.view(adversary.to(device=target.device, dtype=target.dtype).eval(), FULL)
    return lambda: ModelDraft(seen)


class Drafts:
    """The drafts of a target, by name."""

    def __init__(self, subject: Subject, drafts: Mapping[str, ForModel]) -> None:
        self._made = {name: of(subject) for name, of in drafts.items()}

    def policy(self, name: str | None, gamma: Gamma) -> Policy:
        """Return who decides on the rounds of one request.

        Args:
            name: the draft's name; None for none, `ANY` for the controller's choice.
            gamma: drafted tokens a round; `auto` leaves them to the controller too, and only to it.
        """
        if gamma != AUTO:
            return Fixed(None if name is None else self._made[name](), gamma)
        assert name == ANY, name
        # The adversarial draft is taken first, so that the controller soon has a reason to change its mind.
        names = sorted(self._made, key=lambda each: each != ADVERSARIAL)
        costs = Costs({m: 1.0 + SLOPE * (m - 1) for m in range(1, MAX_GAMMA + 2)}, dict.fromkeys(names, STEP))
        return Steady(Controller({each: self._made[each]() for each in names}, costs), costs)


STEP, SLOPE = 0.1, 0.02
"""A draft's step, and each further token of a target pass, in plain steps: what makes drafting pay."""


@dataclasses.dataclass(frozen=True)
class Steady:
    """A controller whose clock is arithmetic: rounds take what was foretold, so that a run can be repeated.

    A walk through all branches needs that, and a seed that is to give the same test again.
    """

    controller: Controller
    costs: Costs

    def check(self, target: Model) -> None:
        """See `Policy`."""
        self.controller.check(target)

    def choose(self, state: State, most: int) -> RoundPlan:
        """See `Policy`."""
        return self.controller.choose(state, most)

    def observe(self, done: Round) -> None:
        """See `Policy`."""
        drafting = done.num_drafted * self.costs.drafts.get(done.draft, 0.0)
        passing = self.costs.target[done.num_drafted + 1]
        self.controller.observe(done._replace(draft_seconds=drafting, target_seconds=passing))
