"""Invariant 4, end to end: the exact output distribution, by walking through every branch of its choices.

Nothing is sampled, so nothing can fail by chance. The joint distribution of gamma + 2 tokens is compared: the
first is the prefill's, then at least one full round with its bonus, then what follows from the cache
that this round left. A suite of planted bugs shows that the comparison sees them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from typing import Any

import pytest

from models.decode.engine import engine
from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.engine import stream
from models.decode.engine.lookup import LookupDraft
from models.decode.engine.policy import PLAIN, Round, RoundPlan
from models.decode.engine.state import State
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import Random
from models.decode.sampling.verifiers import VERIFIERS, Verifier
from models.decode.tune.controller import Controller
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import Model, View
from models.measure.reference import full_pass_probs, plain_decode
from models.verify.checks import EXACT, SAMPLINGS, Case, check_exact
from models.verify.drafts import ForModel, MakeDraft, Subject, adversarial, member
from models.verify.exact import Distribution, exact_distribution, total_variation
from models.verify.tiny_vocab import TinyVocab

MakeModel = Callable[..., ElasticLM]

VISIBLE = 1e-3  # what a planted bug must exceed
PROMPT = [1, 0]
WARM, PENALTY, TOP_K = (SAMPLINGS[name] for name in ("T=1", "T=1 penalty=1.3", "T=1.5 top-k=2"))


def nested(text: str, precision: str | None = None, vocabulary: Sequence[int] | None = None) -> ForModel:
    return member(Granularity.parse(text), precision, vocabulary)


# Passes of a trimmed head are its own, not the view's: they are not remembered.
TRIMMED = ("two tokens", "two tokens of the target", "two tokens in int8")


def own_cache(subject: Subject) -> MakeDraft:
    seen = subject.view(subject.target, Granularity.parse("layers=1"))
    return lambda: ModelDraft(seen)


def lookup(_: Subject) -> MakeDraft:
    return partial(LookupDraft, shortest=1)


DRAFTS: dict[str, ForModel] = {
    "narrow": nested("ffn=0.125,heads=0.5"),
    "first layer": nested("layers=0"),
    "last layer": nested("ffn=0.5,layers=1"),
    "whole target": nested("full"),
    "narrow in int8": nested("ffn=0.125,heads=0.5", "int8"),
    "whole target in int8": nested("full", "int8"),
    "last layer in int4": nested("layers=1", "int4"),
    "last layer in q4_0": nested("layers=1", "q4_0"),
    "last layer in bf16": nested("ffn=0.5,layers=1", "bf16"),
    "two tokens": nested("ffn=0.5,layers=0", vocabulary=[2, 0]),
    "two tokens of the target": nested("full", vocabulary=[2, 0]),
    "two tokens in int8": nested("layers=1", "int8", vocabulary=[2, 0]),
    "own cache": own_cache,
    "adversarial": adversarial,
    "lookup": lookup,
}


CASES: list[Any] = [  # the number of tokens, and a case
    *((3, Case(verifier, draft, 1)) for draft in DRAFTS for verifier in VERIFIERS),
    (3, Case("token", "adversarial", 2)),
    (3, Case("block", "first layer", 2)),
    (2, Case("token", "narrow", 3)),
    (2, Case("block", "adversarial", 3)),
    *((2, Case(verifier, "lookup", 3)) for verifier in VERIFIERS),
    *((4, Case("block", draft, 2, "T=1.5 top-k=2")) for draft in ("narrow", "own cache", "adversarial")),
    *((4, Case(verifier, "last layer", 2, "T=1.5 top-p=0.8")) for verifier in VERIFIERS),
    (4, Case("token", "adversarial", 2, "T=1.5 top-p=0.8")),
    (3, Case("block", "first layer", 2, "T=1 penalty=1.3")),
    (2, Case("token", "own cache", 3, "T=1 penalty=1.3")),
    *((4, Case("block", draft, 1, "all")) for draft in ("narrow", "adversarial", "two tokens")),
    (3, Case("block", "last layer", 3, "all")),
    (4, Case("token", "two tokens of the target", 2, "all")),
    *((4, Case("block", "lookup", 2, name)) for name in ("T=1.5 top-k=2", "all")),
    *(
        (3, Case(verifier, draft, 2, name))
        for draft in ("adversarial", "lookup", "two tokens")
        for name in ("T=1.5 min-p=0.3", "T=1 penalty=1.3")
        for verifier in VERIFIERS
    ),
    *((3, Case("block", "two tokens", 2, name)) for name in ("T=1", "T=1.5 top-k=2", "T=1.5 top-p=0.8")),
    *((5, Case("block", draft, 3, name)) for draft in DRAFTS for name in ("greedy", "greedy penalty=3")),
    pytest.param(8, Case("block", "narrow", 1), marks=pytest.mark.slow),
]


def reference_distribution(model: Model, params: SamplingParams, num_tokens: int) -> Distribution:
    p = full_pass_probs(model, params)
    return exact_distribution(
        lambda random: plain_decode(p, PROMPT, max_new_tokens=num_tokens, random=random)
    )


def draft_of(model: ElasticLM, name: str) -> Draft:
    return DRAFTS[name](Subject(model, View, range(model.config.vocab_size)))()


def engine_distribution(model: Model, **options: Any) -> Distribution:
    return exact_distribution(
        lambda random: [token.id for token in stream(model, PROMPT, random=random, **options)]
    )


@pytest.mark.parametrize(("num_tokens", "case"), CASES)
def test_the_output_distribution_is_the_targets_for_every_draft(
    num_tokens: int, case: Case, make_model: MakeModel
) -> None:
    draft, model = str(case.draft), make_model(vocab_size=num_tokens)
    few = TinyVocab(model, {draft: DRAFTS[draft]}, remember=draft not in TRIMMED)
    check = check_exact(few, case)
    assert check.passed, check


def test_plain_decoding_has_the_targets_distribution(make_model: MakeModel) -> None:
    check = check_exact(TinyVocab(make_model(vocab_size=4), {}), Case("block", None, 1))
    assert check.passed, check


# ------------------------------------------------------------------ who drafts depends on the text


@dataclass
class Fickle:
    """Chooses the draft and how much by committed tokens and by what the last round accepted."""

    drafts: Sequence[Draft]
    accepted: int = 0
    costs: None = None

    def check(self, target: Model) -> None:
        for draft in self.drafts:
            draft.check(target)

    def choose(self, state: State, most: int) -> RoundPlan:
        number = sum(state.ids) + self.accepted
        gamma = min(number % 3, most)
        return RoundPlan(self.drafts[number % len(self.drafts)], gamma) if gamma else PLAIN

    def observe(self, done: Round) -> None:
        self.accepted = done.num_accepted


ADAPTIVE = [*((WARM, 2, verifier) for verifier in VERIFIERS), (PENALTY, 2, "block"), (TOP_K, 3, "token")]


@pytest.mark.parametrize(("params", "vocab_size", "verifier"), ADAPTIVE)
def test_the_distribution_holds_where_committed_tokens_and_past_rounds_choose_the_draft(
    params: SamplingParams, vocab_size: int, verifier: str, make_model: MakeModel
) -> None:
    model = make_model(vocab_size=vocab_size)
    plans: set[tuple[int, int]] = set()
    drafts = [draft_of(model, name) for name in ("first layer", "adversarial", "lookup")]

    class Noted(Fickle):
        def observe(self, done: Round) -> None:
            plans.add((done.num_drafted, done.num_accepted))
            super().observe(done)

    ours = exact_distribution(
        lambda random: [
            token.id
            for token in stream(
                model,
                PROMPT,
                policy=Noted(drafts),
                random=random,
                params=params,
                max_new_tokens=5,
                verifier=verifier,
            )
        ]
    )
    assert total_variation(ours, reference_distribution(model, params, 5)) < EXACT
    assert {num for num, _ in plans} == {0, 1, 2}
    assert {(1, 0), (1, 1), (2, 2)} <= plans


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_the_distribution_holds_under_the_controller(
    verifier: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(vocab_size=2)
    gammas: set[tuple[object, object]] = set()
    costs = Costs({1: 1.0, 2: 1.1, 3: 1.2}, {"adversarial": 0.1})

    def decode(random: Random) -> list[int]:
        monkeypatch.setattr(engine, "perf_counter", partial(next, count()))  # every round takes as long
        drafts = {name: draft_of(model, name) for name in ("adversarial", "lookup")}
        tokens = stream(
            model,
            PROMPT,
            policy=Controller(drafts, costs, alphas={"adversarial": 0.6}, most=2),
            random=random,
            params=WARM,
            max_new_tokens=5,
            verifier=verifier,
        )
        ids = [token.id for token in tokens]
        gammas.update((choice["draft"], choice["gamma"]) for choice in tokens.report.choices())
        return ids

    assert total_variation(exact_distribution(decode), reference_distribution(model, WARM, 5)) < EXACT
    assert {name for name, _ in gammas} >= {"adversarial", "lookup"}
    assert {gamma for _, gamma in gammas} >= {0, 1, 2}


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_the_distribution_holds_where_the_end_of_text_falls_inside_a_block(
    verifier: str, make_model: MakeModel
) -> None:
    few = TinyVocab(make_model(vocab_size=3), {"last layer": nested("layers=1")})
    check = check_exact(few, Case(verifier, "last layer", 2), ends=True)
    assert check.passed, check


def test_a_member_as_the_target_keeps_its_own_distribution(make_model: MakeModel) -> None:
    model = make_model(vocab_size=3)
    target = View(model, Granularity.parse("heads=0.5"))
    draft = NestedDraft(View(model, Granularity.parse("ffn=0.25,heads=0.5,layers=1")))
    ours = engine_distribution(target, draft=draft, params=WARM, gamma=1, max_new_tokens=3)
    assert total_variation(ours, reference_distribution(target, WARM, 3)) < EXACT
    assert total_variation(ours, reference_distribution(model, WARM, 3)) > VISIBLE


# ------------------------------------------------------------------ every kind of member

KINDS = {
    "ffn": "ffn=0.25",
    "heads": "heads=0.5",
    "layers": "layers=1",
    "exit": "layers=0",
    "mix": "ffn=1:0.25,heads=0.5:1",
}
PROCESSORS = [params for params in SAMPLINGS.values() if not params.is_greedy]


@pytest.mark.portable
@pytest.mark.parametrize("gamma", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int8", "int4", "q4_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_holds_for_every_member_precision_processor_and_end_of_text(
    kind: str, precision: str | None, gamma: int, make_model: MakeModel
) -> None:
    few = TinyVocab(make_model(vocab_size=3), {kind: member(Granularity.parse(KINDS[kind]), precision)})
    for params, eos in product(PROCESSORS, ((), (2,))):
        options: dict[str, Any] = {"params": params, "length": gamma + 2, "eos_token_ids": eos}
        theirs = few.reference(**options)
        for verifier in VERIFIERS:
            ours = few.distribution(draft=kind, gamma=gamma, verifier=verifier, **options)
            assert total_variation(ours, theirs) < EXACT, (params, eos, verifier)


# ------------------------------------------------------------------ planted bugs


@pytest.mark.parametrize(("gamma", "vocab_size"), [(1, 3), (2, 2)])
def test_a_planted_bug_is_seen(
    planted_bug: Callable[[Draft], dict[str, Any]], gamma: int, vocab_size: int, make_model: MakeModel
) -> None:
    model, num_tokens = make_model(vocab_size=vocab_size), gamma + 2
    draft = draft_of(model, "adversarial")
    options = {"params": WARM, "gamma": gamma, "max_new_tokens": num_tokens, "draft": draft}
    ours = engine_distribution(model, **{**options, "verifier": "token", **planted_bug(draft)})
    assert total_variation(ours, reference_distribution(model, WARM, num_tokens)) > VISIBLE


def test_without_a_bug_the_verifier_that_they_are_planted_in_is_right(
    rebuilt_verifier: Verifier, make_model: MakeModel
) -> None:
    model = make_model(vocab_size=3)
    draft = draft_of(model, "adversarial")
    options = {"params": WARM, "gamma": 1, "max_new_tokens": 3, "draft": draft}
    ours = engine_distribution(model, verifier=rebuilt_verifier, **options)
    assert total_variation(ours, reference_distribution(model, WARM, 3)) < EXACT
