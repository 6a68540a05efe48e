"""The tests that `nestling verify` runs hold for a sound engine, and each can fail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from models.decode.engine import scheduler as passes
from models.decode.engine.draft import Draft, Prior
from models.decode.engine.policy import Fixed, Policy
from models.decode.engine.scheduler import Steps
from models.decode.engine.state import State
from models.decode.sampling.samplers import VERIFIER_NAMES, Proposal, Sampler
from models.decode.sampling.verifiers import Verifier
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import Model, View
from models.packed.quantize import pack
from models.verify import plan as verify
from models.verify.checks import COUNTED_GAMMA, SAMPLINGS, Case, Check, check_counts, check_dtype, check_exact
from models.verify.drafts import ANY, AUTO, Drafts, Gamma, MakeDraft, Subject, adversarial, member, separate
from models.verify.effort import QUICK
from models.verify.identity import Whole, check_batch, check_identity, gap_between
from models.verify.plan import plan_checks
from models.verify.restrict import restrict
from models.verify.tiny_vocab import TinyVocab

Bug = Callable[[Draft], dict[str, Any]]

FIRST = member(Granularity.parse("layers=0-1"))
PROMPTS = ([3, 1, 4], [1, 5])


def stranger(like: ElasticLM) -> ElasticLM:
    """Another model of one layer, with the same tokens."""
    other = ElasticLM(replace(like.config, num_hidden_layers=1))
    other.init_weights(torch.Generator().manual_seed(5))
    return other.eval()


def few(model: ElasticLM, num_tokens: int, dtype: torch.dtype = torch.float64) -> TinyVocab:
    return TinyVocab(
        restrict(model, range(5, 5 + num_tokens), dtype), {"D": FIRST, "adversarial": adversarial}
    )


def with_bug(model: ElasticLM, num_tokens: int, bug: Bug) -> tuple[TinyVocab, Case]:
    """The same, with a draft or verifier of the bug's."""

    def spoiled(subject: Subject) -> MakeDraft:
        make = adversarial(subject)
        return lambda: bug(make()).get("draft", make())

    target = restrict(model, range(5, 5 + num_tokens), torch.float64)
    gamma = 1 if num_tokens > 2 else 2
    subject = TinyVocab(target, {"bad": spoiled})
    verifier = bug(adversarial(Subject(target, View, ()))()).get("verifier", "token")
    return subject, Case(verifier, "bad", gamma)


def believes(p_TV: Any, q_TV: Any, drafted: Sequence[int], random: Any) -> list[int]:
    """A verifier that accepts whatever was drafted."""
    return [*drafted, random.target(p_TV[-1])]


# ------------------------------------------------------------------ all of them


SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("fp32", "int8")]


@pytest.mark.portable
@pytest.mark.parametrize("dtype", ["bf16", *SLOW])
def test_a_sound_engine_passes_every_test(
    dtype: str, tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "SAMPLINGS", {name: SAMPLINGS[name] for name in ("T=1", "all", "greedy")})
    source = tiny_model.bfloat16() if dtype == "bf16" else tiny_model
    plan = plan_checks(
        pack(source, dtype),
        dtype=dtype,
        drafts={
            "D": FIRST,
            "S@int8": member(Granularity.parse("ffn=0.5"), "int8"),
            "D@int4": member(Granularity.parse("layers=0"), "int4"),
            "folder": separate(stranger(tiny_model)),
        },
        verifiers=VERIFIER_NAMES,
        prompts=PROMPTS,
        effort=replace(QUICK, num_tokens={1: 3, 2: 2, 3: 2}, num_trials=200, length=12),
    )
    checks = [job() for job in plan.jobs]
    assert [check for check in checks if not check.passed] == []
    assert {check.test for check in checks} == {"exact", "dtype", "counts", "coupled", "greedy"}
    assert {check.dtype for check in checks} == {"fp64", "fp32", dtype}
    names = {"D", "S@int8", "D@int4", "folder", "adversarial", "lookup", "any"}
    for test, dtypes in (("exact", ["fp64"]), ("greedy", ["fp32", dtype]), ("coupled", ["fp32", dtype])):
        found = {(check.draft, check.dtype) for check in checks if check.test == test}
        assert found >= {(name, each) for name in names for each in dtypes}, test
    together = {(check.test, check.draft, check.gamma) for check in checks if check.batch > 1}
    rows = ("D,adversarial", "1,2")  # there are two prompts
    assert together == {("exact", "D", "1"), ("dtype", "D", "1"), ("greedy", *rows), ("coupled", *rows)}
    for test in ("dtype", "counts"):
        assert {check.draft for check in checks if check.test == test} >= {"D", "adversarial", "lookup"}, test
    assert {check.gamma for check in checks if check.draft == "any"} == {"auto"}
    bounds = [check.bound for check in checks if check.test == "counts"]
    assert sum(bounds) == pytest.approx(verify.FALSE_ALARM / 10)


def test_only_the_verifiers_that_were_asked_for_are_tested(tiny_model: ElasticLM) -> None:
    counted = []
    for verifiers in (["token"], ["coupled"], ["token", "block"]):
        plan = plan_checks(
            tiny_model,
            dtype="fp32",
            drafts={"D": FIRST},
            verifiers=verifiers,
            prompts=PROMPTS,
            num_trials=1,
            length=2,
        )
        counted.append(len(plan.jobs))
    token, coupled, both = counted
    greedy = 5  # three drafts, a controller, a batch
    assert both - greedy == 2 * (token - greedy)
    assert coupled == 2 * greedy + 1


# ------------------------------------------------------------------ distributions over a few tokens


@pytest.mark.parametrize("num_tokens", [2, 3])
def test_a_planted_bug_fails_the_walk(planted_bug: Bug, num_tokens: int, tiny_model: ElasticLM) -> None:
    check = check_exact(*with_bug(tiny_model, num_tokens, planted_bug))
    assert not check.passed
    assert check.value > 1e-3


def test_the_walk_sees_a_distribution_that_is_not_the_targets(
    rebuilt_verifier: Verifier, tiny_model: ElasticLM
) -> None:
    subject, case = with_bug(tiny_model, 3, lambda _: {"verifier": rebuilt_verifier})
    assert check_exact(subject, case).passed
    assert check_exact(subject, case, ends=True).passed


def test_a_planted_bug_fails_when_a_controller_chooses(planted_bug: Bug, tiny_model: ElasticLM) -> None:
    subject, case = with_bug(tiny_model, 2, planted_bug)
    check = check_exact(subject, replace(case, draft=ANY, gamma=AUTO))
    assert not check.passed
    assert check.value > 1e-3
    assert check_exact(few(tiny_model, 2), Case("token", ANY, AUTO)).passed


def test_a_bug_of_batches_is_seen_in_a_batch(tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch) -> None:
    target = restrict(tiny_model, [5, 6], torch.float64)
    subject = TinyVocab(target, {"D": FIRST, "adversarial": adversarial}, remember=False)
    case = Case("block", "D", 1)
    sound = check_exact(subject, case, in_batch=True)
    assert sound.passed
    assert sound.batch == 3
    run = passes.run

    def leaks(group: Sequence[passes.Pass]) -> list[torch.Tensor]:
        """Every pass of a group sees a little of the last one."""
        found = run(group)
        return [logits_TV + 0.1 * found[-1][-1] * (len(group) > 1) for logits_TV in found]

    own = TinyVocab(restrict(tiny_model, [5, 6]), {"D": FIRST, "adversarial": adversarial}, remember=False)
    in_dtype = check_dtype(own, subject, case, dtype="fp32", in_batch=True)
    assert (in_dtype.passed, in_dtype.batch) == (True, 3)
    monkeypatch.setattr(passes, "run", leaks)
    assert check_exact(subject, case).passed
    assert not check_exact(subject, case, in_batch=True).passed
    assert not check_dtype(own, subject, case, dtype="fp32", in_batch=True).passed


def test_a_bug_of_one_dtype_is_seen_beside_its_rounding(tiny_model: ElasticLM) -> None:
    precise, own = few(tiny_model, 2), few(tiny_model.bfloat16(), 2, torch.bfloat16)
    sound = check_dtype(own, precise, Case("token", "adversarial", 2), dtype="bf16")
    assert sound.passed
    assert sound.bound < 0.1
    assert not check_dtype(own, precise, Case(believes, "adversarial", 2), dtype="bf16").passed


def test_counts_that_their_distribution_does_not_give_fail(tiny_model: ElasticLM) -> None:
    subject = few(tiny_model, 2, torch.float32)
    counts: dict[str, Any] = {"dtype": "fp32", "num_trials": 1000, "bound": 1e-8}
    case = Case("token", "adversarial", COUNTED_GAMMA)
    assert check_counts(subject, case, **counts).passed

    assert not check_counts(subject, Case(believes, "adversarial", COUNTED_GAMMA), **counts).passed
    exact = subject.distribution
    subject.distribution = lambda **options: exact(**{**options, "params": SAMPLINGS["T=0.7"]})  # type: ignore[method-assign]
    assert not check_counts(subject, case, **counts).passed
    assert not check_counts(subject, Case("coupled", None, 0), **counts).passed


# ------------------------------------------------------------------ tokens of the whole model


@dataclass
class Spoils:
    """Writes over the committed keys and values, as no draft may."""

    draft: Draft
    factor: float

    prior = Prior()

    def check(self, target: Model) -> None:
        self.draft.check(target)

    def renew(self) -> Draft:
        return self

    def room(self, state: State) -> None:
        """Any number."""

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        keys, _ = state.cache.read(0)
        keys.mul_(self.factor)
        return (yield from self.draft.propose(state, num_tokens, sampler))


def identity(model: ElasticLM, dtype: str, sampling: str, factor: float) -> Check:
    whole = Whole(model=model, dtype=dtype, prompts=PROMPTS, length=24)
    make = FIRST(Subject(model, View, ()))
    return check_identity(
        whole, "D", lambda gamma: Fixed(Spoils(make(), factor), int(gamma)), sampling=sampling
    )


@pytest.mark.parametrize("sampling", ["greedy", "T=1"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_spoiled_cache_is_no_near_tie(sampling: str, dtype: str, tiny_model: ElasticLM) -> None:
    model = tiny_model.bfloat16() if dtype == "bf16" else tiny_model
    sound, spoiled = identity(model, dtype, sampling, 1.0), identity(model, dtype, sampling, -1.0)
    assert sound.passed
    assert not spoiled.passed
    assert spoiled.value > spoiled.bound > 0
    if dtype == "fp32":
        assert (sound.value, sound.note) == (0.0, "48 tokens of 48 alike")


@pytest.mark.parametrize("sampling", ["greedy", "T=1"])
def test_a_spoiled_cache_is_seen_in_a_batch(sampling: str, tiny_model: ElasticLM) -> None:
    whole = Whole(model=tiny_model, dtype="fp32", prompts=PROMPTS, length=24)
    drafts = Drafts(Subject(tiny_model, View, range(64)), {"D": FIRST})

    def check(factor: float) -> Check:
        def spoiled(gamma: Gamma) -> Policy:
            return Fixed(Spoils(FIRST(Subject(tiny_model, View, ()))(), factor), int(gamma))

        return check_batch(
            whole, {("D", 2): partial(drafts.policy, "D"), ("D", 3): spoiled}, sampling=sampling
        )

    sound, spoiled = check(1.0), check(-1.0)
    assert (sound.value, sound.note, sound.batch) == (0.0, "48 tokens of 48 alike", 2)
    assert (sound.draft, sound.gamma) == ("D,D", "2,3")
    assert not spoiled.passed


def test_a_gap_is_what_the_choice_compared(tiny_model: ElasticLM) -> None:
    whole = Whole(model=tiny_model, dtype="fp32", prompts=PROMPTS, length=1)
    logits_V = tiny_model(torch.tensor([PROMPTS[0]]))[0, -1].detach()
    best, second = logits_V.topk(2).indices.tolist()
    gap, tie = gap_between(whole, PROMPTS[0], (second, best), SAMPLINGS["greedy"])
    assert gap == pytest.approx(float(logits_V[best] - logits_V[second]))
    assert 0 < tie < 1e-4
    (chosen,) = whole.plain(PROMPTS[0], SAMPLINGS["T=1"])
    gaps = [
        gap_between(whole, PROMPTS[0], (token, chosen), SAMPLINGS["T=1"])[0]
        for token in range(tiny_model.config.vocab_size)
    ]
    assert gaps.count(0.0) == 1
    assert gaps[chosen] == 0.0
    other = replace(whole, seed=1)
    assert gap_between(other, PROMPTS[0], (best, second), SAMPLINGS["T=1"])[0] != gap
