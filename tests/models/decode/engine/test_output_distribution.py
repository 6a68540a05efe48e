"""Invariant 4, end to end: the exact output distribution, by walking through every branch of its choices.

Nothing is sampled, so nothing can fail by chance. The joint distribution of gamma + 2 tokens is compared: the
first is the prefill's, then at least one full round with its bonus, then what follows from the cache
that this round left. A suite of planted bugs shows that the comparison sees them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from typing import Any, NamedTuple

import pytest
import torch

from models.decode.engine import engine
from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.engine import stream
from models.decode.engine.lookup import LookupDraft
from models.decode.engine.policy import PLAIN as PLAINLY
from models.decode.engine.policy import Plan, Round
from models.decode.engine.state import Model, State
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import Random
from models.decode.sampling.verifiers import VERIFIERS, Verifier
from models.decode.tune.controller import Controller
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.reference import full_pass_probs, plain_decode
from models.packed.quantize import pack
from models.verify.drafts import member
from models.verify.exact import Distribution, exact_distribution, total_variation
from models.verify.tiny_vocab import TinyVocab

MakeModel = Callable[..., ElasticLM]

EXACT = 1e-10  # float64 passes over cached and over fresh positions differ by about 1e-16
VISIBLE = 1e-3  # what a planted bug must exceed
PROMPT = [1, 0]
PLAIN = SamplingParams(temperature=1.0)
TOP_K = SamplingParams(temperature=0.6, top_k=2)
TOP_P = SamplingParams(temperature=1.5, top_p=0.6)
MIN_P = SamplingParams(temperature=1.5, min_p=0.4)
PENALTY = SamplingParams(temperature=1.0, repetition_penalty=1.7)
ALL = SamplingParams(temperature=1.5, top_k=3, top_p=0.95, min_p=0.1, repetition_penalty=0.6)
TOP_K_TOP_P = SamplingParams(temperature=1.2, top_k=3, top_p=0.7)


def nested(text: str) -> Callable[[ElasticLM, MakeModel], Draft]:
    return lambda model, _: NestedDraft(View(model, Granularity.parse(text)))


def hostile(model: ElasticLM, make_model: MakeModel) -> Draft:
    return ModelDraft(make_model(seed=99, vocab_size=model.config.vocab_size))


def own_cache(model: ElasticLM, _: MakeModel) -> Draft:
    return ModelDraft(View(model, Granularity.parse("layers=1")))


def lookup(_: ElasticLM, __: MakeModel) -> Draft:
    return LookupDraft(shortest=1)


def packed(text: str, precision: str) -> Callable[[ElasticLM, MakeModel], Draft]:
    granularity = Granularity.parse(text)
    return lambda model, _: NestedDraft(View(pack(model, precision, granularity), granularity))


def few_tokens(text: str, precision: str | None = None) -> Callable[[ElasticLM, MakeModel], Draft]:
    granularity = Granularity.parse(text)

    def make(model: ElasticLM, _: MakeModel) -> Draft:
        source = model if precision is None else pack(model, precision, granularity)
        return NestedDraft(View(source, granularity), torch.tensor([2, 0]))

    return make


DRAFTS = {
    "narrow": nested("ffn=0.125,heads=0.5"),
    "first layer": nested("layers=0"),
    "last layer": nested("ffn=0.5,layers=1"),
    "whole target": nested("full"),
    "narrow in int8": packed("ffn=0.125,heads=0.5", "int8"),
    "whole target in int8": packed("full", "int8"),
    "last layer in int4": packed("layers=1", "int4"),
    "last layer in bf16": packed("ffn=0.5,layers=1", "bf16"),
    "two tokens": few_tokens("ffn=0.5,layers=0"),
    "two tokens of the target": few_tokens("full"),
    "two tokens in int8": few_tokens("layers=1", "int8"),
    "own cache": own_cache,
    "hostile": hostile,
    "lookup": lookup,
}


class Case(NamedTuple):
    params: SamplingParams
    gamma: int
    vocab_size: int
    draft: str
    verifier: str


CASES = [
    *(Case(PLAIN, 1, 3, draft, verifier) for draft in DRAFTS for verifier in VERIFIERS),
    Case(PLAIN, 2, 3, "hostile", "token"),
    Case(PLAIN, 2, 3, "first layer", "block"),
    Case(PLAIN, 3, 2, "narrow", "token"),
    Case(PLAIN, 3, 2, "hostile", "block"),
    *(Case(TOP_K, 2, 4, draft, "block") for draft in ("narrow", "own cache", "hostile")),
    *(Case(TOP_P, 2, 4, "last layer", verifier) for verifier in VERIFIERS),
    Case(TOP_P, 2, 4, "hostile", "token"),
    Case(TOP_K_TOP_P, 3, 4, "last layer", "block"),
    *(Case(SamplingParams(), 3, 5, draft, "block") for draft in DRAFTS),
    *(Case(params, 2, 3, "hostile", verifier) for params in (MIN_P, PENALTY) for verifier in VERIFIERS),
    Case(PENALTY, 2, 3, "first layer", "block"),
    Case(PENALTY, 3, 2, "own cache", "token"),
    *(Case(params, 2, 3, "lookup", verifier) for params in (MIN_P, PENALTY) for verifier in VERIFIERS),
    *(Case(PLAIN, 3, 2, "lookup", verifier) for verifier in VERIFIERS),
    *(Case(params, 2, 4, "lookup", "block") for params in (TOP_K, TOP_K_TOP_P, ALL)),
    *(Case(ALL, 1, 4, draft, "block") for draft in ("narrow", "hostile")),
    *(Case(SamplingParams(repetition_penalty=3.0), 3, 5, draft, "block") for draft in DRAFTS),
    *(
        Case(params, 2, 3, "two tokens", verifier)
        for params in (PLAIN, TOP_K, TOP_P, MIN_P, PENALTY)
        for verifier in VERIFIERS
    ),
    Case(ALL, 1, 4, "two tokens", "block"),
    Case(TOP_K_TOP_P, 2, 4, "two tokens of the target", "token"),
    pytest.param(Case(PLAIN, 1, 8, "narrow", "block"), marks=pytest.mark.slow),
]


def reference_distribution(
    model: Model,
    params: SamplingParams,
    num_tokens: int,
    eos_token_ids: Sequence[int] = (),
) -> Distribution:
    p = full_pass_probs(model, params)
    return exact_distribution(
        lambda random: plain_decode(
            p, PROMPT, max_new_tokens=num_tokens, random=random, eos_token_ids=eos_token_ids
        )
    )


def engine_distribution(model: Model, **options: Any) -> Distribution:
    return exact_distribution(
        lambda random: [token.id for token in stream(model, PROMPT, random=random, **options)]
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
def test_the_output_distribution_is_the_targets_for_every_draft(
    case: Case,
    make_model: MakeModel,
) -> None:
    model = make_model(vocab_size=case.vocab_size)
    draft, num_tokens = DRAFTS[case.draft](model, make_model), case.gamma + 2
    options = {"params": case.params, "gamma": case.gamma, "max_new_tokens": num_tokens}
    ours = engine_distribution(model, draft=draft, verifier=case.verifier, **options)
    assert total_variation(ours, reference_distribution(model, case.params, num_tokens)) < EXACT


def test_plain_decoding_has_the_targets_law(make_model: MakeModel) -> None:
    model = make_model(vocab_size=4)
    ours = engine_distribution(model, params=PLAIN, max_new_tokens=3)
    assert total_variation(ours, reference_distribution(model, PLAIN, 3)) < EXACT


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

    def choose(self, state: State, most: int) -> Plan:
        number = sum(state.ids) + self.accepted
        gamma = min(number % 3, most)
        return Plan(self.drafts[number % len(self.drafts)], gamma) if gamma else PLAINLY

    def observe(self, done: Round) -> None:
        self.accepted = done.num_accepted


ADAPTIVE = [*((PLAIN, 2, verifier) for verifier in VERIFIERS), (PENALTY, 2, "block"), (TOP_K, 3, "token")]


@pytest.mark.parametrize(("params", "vocab_size", "verifier"), ADAPTIVE)
def test_the_distribution_holds_where_settled_tokens_and_past_rounds_choose_the_draft(
    params: SamplingParams, vocab_size: int, verifier: str, make_model: MakeModel
) -> None:
    model = make_model(vocab_size=vocab_size)
    plans: set[tuple[int, int]] = set()
    drafts = [DRAFTS[name](model, make_model) for name in ("first layer", "hostile", "lookup")]

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
    costs = Costs({1: 1.0, 2: 1.1, 3: 1.2}, {"S": 0.1})

    def decode(random: Random) -> list[int]:
        monkeypatch.setattr(engine, "perf_counter", partial(next, count()))  # every round takes as long
        drafts = {"S": hostile(model, make_model), "lookup": LookupDraft(shortest=1)}
        tokens = stream(
            model,
            PROMPT,
            policy=Controller(drafts, costs, alphas={"S": 0.6}, most=2),
            random=random,
            params=PLAIN,
            max_new_tokens=5,
            verifier=verifier,
        )
        ids = [token.id for token in tokens]
        gammas.update((choice["draft"], choice["gamma"]) for choice in tokens.report.choices())
        return ids

    assert total_variation(exact_distribution(decode), reference_distribution(model, PLAIN, 5)) < EXACT
    assert {name for name, _ in gammas} >= {"S", "lookup"}
    assert {gamma for _, gamma in gammas} >= {0, 1, 2}


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_the_distribution_holds_where_the_end_of_text_falls_inside_a_block(
    verifier: str, make_model: MakeModel
) -> None:
    model = make_model(vocab_size=3)
    draft = NestedDraft(View(model, Granularity.parse("layers=1")))
    options = {"params": PLAIN, "gamma": 2, "max_new_tokens": 4, "verifier": verifier}
    ours = engine_distribution(model, draft=draft, eos_token_ids=(2,), **options)
    theirs = reference_distribution(model, PLAIN, 4, eos_token_ids=(2,))
    assert total_variation(ours, theirs) < EXACT
    assert {len(ids) for ids in ours} == {1, 2, 3, 4}


def test_a_member_as_the_target_keeps_its_own_law(make_model: MakeModel) -> None:
    model = make_model(vocab_size=3)
    target = View(model, Granularity.parse("heads=0.5"))
    draft = NestedDraft(View(model, Granularity.parse("ffn=0.25,heads=0.5,layers=1")))
    ours = engine_distribution(target, draft=draft, params=PLAIN, gamma=1, max_new_tokens=3)
    assert total_variation(ours, reference_distribution(target, PLAIN, 3)) < EXACT
    assert total_variation(ours, reference_distribution(model, PLAIN, 3)) > VISIBLE


# ------------------------------------------------------------------ every kind of member

KINDS = {
    "ffn": "ffn=0.25",
    "heads": "heads=0.5",
    "layers": "layers=1",
    "exit": "layers=0",
    "mix": "ffn=1:0.25,heads=0.5:1",
}
PROCESSORS = (PLAIN, TOP_K, TOP_P, MIN_P, PENALTY, ALL)


@pytest.mark.parametrize("gamma", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int8", "int4"])
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
    draft = hostile(model, make_model)
    options = {"params": PLAIN, "gamma": gamma, "max_new_tokens": num_tokens, "draft": draft}
    ours = engine_distribution(model, **{**options, "verifier": "token", **planted_bug(draft)})
    assert total_variation(ours, reference_distribution(model, PLAIN, num_tokens)) > VISIBLE


def test_without_a_bug_the_verifier_that_they_are_planted_in_is_right(
    rebuilt_verifier: Verifier, make_model: MakeModel
) -> None:
    model = make_model(vocab_size=3)
    draft = hostile(model, make_model)
    options = {"params": PLAIN, "gamma": 1, "max_new_tokens": 3, "draft": draft}
    ours = engine_distribution(model, verifier=rebuilt_verifier, **options)
    assert total_variation(ours, reference_distribution(model, PLAIN, 3)) < EXACT
