import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.elastic.cache import KVCache
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.consistency import MEASURES, _measures, evaluate_family, evaluate_shared_alpha
from models.packed.quantize import pack

FAMILY = {
    "XL": FULL,
    "S": Granularity.parse("S"),
    "exit": Granularity.parse("layers=0-1"),
    "ends": Granularity.parse("layers=0:3"),
    "mixed": Granularity.parse("ffn=1:0.5:0.25:0.5,heads=1:0.5:0.5:1"),
    "narrow exit": Granularity.parse("ffn=0.5,layers=0-2"),
}
FP32_SUMS = 2e-5
"""Relative: means of fp32 figures, through products over other numbers of rows."""
SUMS = {None: FP32_SUMS, "fp32": FP32_SUMS, "bf16": 2e-3, "int8": 2e-4, "int4": 2e-4, "q4_0": 2e-4}
"""The same, of a draft in a precision whose rounding hides or magnifies such differences."""
FP32_MASS = 1e-6
"""fp32 probabilities of 64 tokens add up to 1 within this."""


def random_batch(num_rows: int = 3, num_positions: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (num_rows, num_positions + 1), generator=generator)
    labels_BT = ids[:, 1:].clone()
    labels_BT[torch.rand(labels_BT.shape, generator=generator) < 0.3] = -100
    return ids[:, :-1], labels_BT


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [random_batch(3, 16, 1), random_batch(2, 7, 2)]


def reference(
    model: ElasticLM, granularity: Granularity, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Position by position, in float64, from a pass of the member's own."""
    values: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for tokens_BT, labels_BT in batches:
        p_BTV = model(tokens_BT).double().softmax(-1)
        q_BTV = model(tokens_BT, granularity).double().softmax(-1)
        for row, position in (labels_BT != -100).nonzero().tolist():
            p, q = p_BTV[row, position].tolist(), q_BTV[row, position].tolist()
            values["loss"].append(-math.log(q[int(labels_BT[row, position])]))
            values["match"].append(100.0 * (p.index(max(p)) == q.index(max(q))))
            values["kl"].append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            values["alpha"].append(sum(map(min, p, q)))
    return {measure: math.fsum(found) / len(found) for measure, found in values.items()}


def test_each_member_is_measured_as_a_slow_loop_would(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]
) -> None:
    members = evaluate_family(tiny_model, FAMILY, batches)
    assert [member.name for member in members] == list(FAMILY)
    for member, granularity in zip(members, FAMILY.values(), strict=True):
        assert Granularity.parse(member.granularity) == granularity
        assert member.parameters == count_parameters(tiny_model.config, granularity)
        assert member.loss is not None
        assert member.perplexity == pytest.approx(math.exp(member.loss))
        for measure, theirs in reference(tiny_model, granularity, batches).items():
            ours = getattr(member, measure)
            assert ours == pytest.approx(theirs, rel=FP32_SUMS, abs=FP32_MASS), (member.name, measure)


def test_the_full_member_agrees_with_itself(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]
) -> None:
    (full,) = evaluate_family(tiny_model, {"XL": FULL}, batches)
    assert (full.match, full.kl) == (100.0, 0.0)
    assert full.alpha == pytest.approx(1, abs=FP32_MASS)


class CountingPasses:
    """Counts the layers that run."""

    def __init__(self, model: ElasticLM) -> None:
        self.count = 0
        for block in model.model.layers:
            block.register_forward_hook(self.hook)

    def hook(self, *_: object) -> None:
        self.count += 1


def test_one_full_pass_serves_all_members_and_all_exits(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]
) -> None:
    layers = CountingPasses(tiny_model)
    exits = {str(count): Granularity(layers=tuple(range(count))) for count in (1, 2, 3)}
    evaluate_family(tiny_model, {"XL": FULL, **exits}, batches)
    assert layers.count == 4 * len(batches)
    evaluate_family(tiny_model, {"S": FAMILY["S"], "ends": FAMILY["ends"]}, batches)
    assert layers.count == 4 * len(batches) + (4 + 4 + 2) * len(batches)


def test_measures_do_not_depend_on_batching_or_company(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]
) -> None:
    rows = [
        (tokens_T[None], labels_T[None]) for pair in batches for tokens_T, labels_T in zip(*pair, strict=True)
    ]
    together = evaluate_family(tiny_model, FAMILY, batches)
    alone = [evaluate_family(tiny_model, {name: one}, rows[::-1])[0] for name, one in FAMILY.items()]
    for ours, theirs in zip(together, alone, strict=True):
        for measure in MEASURES:
            expected = pytest.approx(getattr(theirs, measure), rel=FP32_SUMS, abs=FP32_MASS)
            assert getattr(ours, measure) == expected


def test_a_model_in_bf16_is_measured_in_fp32(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]
) -> None:
    (full,) = evaluate_family(tiny_model.to(torch.bfloat16), {"XL": FULL}, batches)
    assert full.kl == 0
    assert full.alpha == pytest.approx(1, abs=FP32_MASS)


def test_progress_is_told_of_each_batch(tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]) -> None:
    calls: list[None] = []
    evaluate_family(tiny_model, FAMILY, iter(batches), progress=lambda: calls.append(None))
    assert len(calls) == len(batches)


def test_what_cannot_be_measured_is_refused(tiny_model: ElasticLM) -> None:
    with pytest.raises(NestlingError, match="no token to predict"):
        evaluate_family(tiny_model, FAMILY, [])
    with pytest.raises(UsageError, match="layer 9"):
        evaluate_family(tiny_model, {"far": Granularity.parse("layers=9")}, [random_batch()])


def views(model: ElasticLM, precision: str | None = None) -> dict[str, View]:
    source = model if precision is None else pack(model, precision)
    return {name: View(source, granularity) for name, granularity in FAMILY.items()}


def drafted_alpha(model: ElasticLM, view: View, tokens_BT: Tensor, block: int) -> float:
    """Decode it: each round the full model commits the prefix, then the draft scores token by token."""
    alphas: list[float] = []
    p_BTV = model(tokens_BT).softmax(-1)
    for start in range(0, tokens_BT.shape[1], block):
        cache = KVCache(model.config, batch_size=len(tokens_BT), num_positions=tokens_BT.shape[1])
        if start:
            model(tokens_BT[:, :start], memory=cache)
            cache.commit(start)
        draft = cache.view()
        for position in range(start, min(start + block, tokens_BT.shape[1])):
            q_BV = view(tokens_BT[:, position : position + 1], draft)[:, 0].softmax(-1)
            draft.commit(1)
            alphas += torch.minimum(p_BTV[:, position], q_BV).sum(-1).tolist()
    return math.fsum(alphas) / len(alphas)


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int8", "int4", "q4_0"])
@pytest.mark.parametrize("block", [1, 3])
def test_shared_alpha_is_what_decoding_from_the_shared_cache_sees(
    tiny_model: ElasticLM, block: int, precision: str | None
) -> None:
    tokens_BT, _ = random_batch(2, 11)
    batch = (tokens_BT, torch.zeros_like(tokens_BT))
    drafts = views(tiny_model, precision)
    with torch.no_grad():
        theirs = {name: drafted_alpha(tiny_model, one, tokens_BT, block) for name, one in drafts.items()}
    ours = evaluate_shared_alpha(tiny_model, drafts, [batch], block=block)
    tolerance = SUMS[precision]
    assert ours == pytest.approx(theirs, rel=tolerance)
    if precision in ("bf16", "int8", "int4", "q4_0"):
        in_place = evaluate_shared_alpha(tiny_model, views(tiny_model), [batch], block=block)
        assert ours["XL"] < 1 - tolerance < in_place["XL"], "the copy is told from its source"


def test_shared_alpha_of_one_endless_block_is_the_members_own(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]
) -> None:
    own = {member.name: member.alpha for member in evaluate_family(tiny_model, FAMILY, batches)}
    drafts = views(tiny_model)
    shared = evaluate_shared_alpha(tiny_model, drafts, batches, block=1000)
    assert shared == pytest.approx(own, rel=FP32_SUMS)
    blocks = evaluate_shared_alpha(tiny_model, drafts, batches, block=3)
    family = evaluate_family(tiny_model, FAMILY, batches, shared_block=3)
    assert {member.name: member.alpha for member in family} == blocks
    alone = evaluate_shared_alpha(tiny_model, drafts, batches, block=1)["S"]
    assert alone != pytest.approx(own["S"], rel=1e-3)


@given(
    st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=2, max_size=2), st.integers(0, 4)
)
def test_kl_and_alpha_keep_their_bounds(logits: list[list[float]], label: int) -> None:
    log_p_NV, log_q_NV = (torch.tensor([row]).log_softmax(-1) for row in logits)
    loss, match, kl, alpha = _measures(log_p_NV, log_q_NV, torch.tensor([label]))[:, 0].tolist()
    assert loss >= 0
    assert match in (0, 1)
    assert kl >= 0
    assert 0 <= alpha <= 1
    # Pinsker's inequality ties the two: 1 - alpha is the total variation.
    assert 1 - alpha <= math.sqrt(kl / 2) + 1e-3


def test_tokens_that_both_exclude_do_not_matter() -> None:
    log_p_NV = torch.tensor([[0.0, 1.0, float("-inf")]]).log_softmax(-1)
    log_q_NV = torch.tensor([[1.0, 0.0, float("-inf")]]).log_softmax(-1)
    ours = _measures(log_p_NV, log_q_NV, torch.tensor([0]))
    theirs = _measures(log_p_NV[:, :2], log_q_NV[:, :2], torch.tensor([0]))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs)


def test_a_token_that_only_the_member_excludes_makes_kl_infinite() -> None:
    log_p_NV = torch.tensor([[0.0, 0.0]]).log_softmax(-1)
    log_q_NV = torch.tensor([[0.0, float("-inf")]]).log_softmax(-1)
    loss, _, kl, alpha = _measures(log_p_NV, log_q_NV, torch.tensor([0]))[:, 0].tolist()
    assert (loss, kl, alpha) == (0.0, math.inf, pytest.approx(0.5))
