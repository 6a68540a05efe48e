import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.elastic.cache import Recording
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.ownership import Ownership, is_owned
from models.elastic.owning import own
from train.data.batch import Batch
from train.objective import joint_loss as objective
from train.objective.joint_loss import joint_loss
from train.objective.losses import DIVERGENCES, cross_entropy, member_loss
from train.objective.sampler import Mixture, Slot, StepPlan, plan_step
from train.objective.teacher import ElasticTeacher
from train.recipe.sections import LossConfig, SamplerConfig

MEMBERS = {
    "S": Granularity.parse("ffn=0.125"),
    "L": Granularity.parse("ffn=0.5,heads=0.5"),
    "D": Granularity.parse("layers=0-1"),
    "XL": FULL,
}
RAMPED = LossConfig(
    divergence="neg_log_alpha", ramp_start=0, ramp_steps=2, narrow_gradient=0.3, exit_gradient=0.3
)
SUM_ORDER = 2e-6
"""Relative to the largest gradient: fp32 sums in another order."""


def make_batch(num_rows: int = 8, *, step: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(step)
    rows_BT = torch.randint(0, 64, (num_rows, 13), generator=generator)
    labels_BT = rows_BT[:, 1:].clone()
    labels_BT[1, 4:] = -100  # rows have different numbers of valid tokens
    labels_BT[6, 9:] = -100
    return Batch(
        tokens_BT=rows_BT[:, :-1],
        labels_BT=labels_BT,
        step=step,
        first_row=0,
        num_rows=num_rows,
        num_valid=int((labels_BT != -100).sum()),
    )


def split(batch: Batch, parts: int) -> list[Batch]:
    size = batch.num_rows // parts
    return [
        batch._replace(
            tokens_BT=batch.tokens_BT[first : first + size],
            labels_BT=batch.labels_BT[first : first + size],
            first_row=first,
        )
        for first in range(0, batch.num_rows, size)
    ]


def share(batch: Batch, processes: int) -> list[Batch]:
    return [
        batch._replace(
            tokens_BT=batch.tokens_BT[rank::processes],
            labels_BT=batch.labels_BT[rank::processes],
            first_row=rank,
            stride=processes,
        )
        for rank in range(processes)
    ]


def gradients(
    model: ElasticLM,
    batches: list[Batch],
    plan: StepPlan,
    config: LossConfig = RAMPED,
    teacher: ElasticLM | None = None,
    hidden: float = 0.0,
) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        says = None if teacher is None else ElasticTeacher(teacher)
        loss = joint_loss(model, MEMBERS, batch, plan, config, block=3, teacher=says, hidden=hidden)
        loss.total.backward()
    return {
        name: parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    assert largest > 0
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=SUM_ORDER * largest * 10, rtol=0)


@pytest.fixture
def teacher(tiny_config: ElasticConfig) -> ElasticLM:
    """A larger model of the same vocabulary."""
    model = ElasticLM(dataclasses.replace(tiny_config, hidden_size=48, num_hidden_layers=5))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["rows", "all", "random", "sandwich"])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize(("taught", "hidden"), [(False, 0.0), (True, 0.0), (False, 1.5)])
def test_micro_batches_of_any_number_give_the_gradient_of_the_whole_step(
    tiny_model: ElasticLM, teacher: ElasticLM, kind: Any, parts: int, taught: bool, hidden: float
) -> None:
    """Invariant 6: one divisor, the valid tokens of the step, though rows hold different numbers of them."""
    plans = {name: granularity.resolve(tiny_model.config) for name, granularity in MEMBERS.items()}
    config = SamplerConfig(kind=kind, row_fraction=0.5, shared_cache=0.5, exit_stride=4)
    batch = make_batch()
    for step in range(3):
        plan = plan_step(plans, config, seed=0, step=step, num_rows=8)
        by = teacher if taught else None
        whole = gradients(tiny_model, [batch], plan, teacher=by, hidden=hidden)
        assert_same(gradients(tiny_model, split(batch, parts), plan, teacher=by, hidden=hidden), whole)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("divergence", ["neg_log_alpha", "forward_kl"])
def test_the_full_model_learns_from_its_teacher_as_if_by_whole_logits(
    tiny_model: ElasticLM, teacher: ElasticLM, monkeypatch: pytest.MonkeyPatch, step: int, divergence: Any
) -> None:
    """Before, amid and after the ramp; the exit still learns from the full model."""
    monkeypatch.setattr(objective, "rows_per_chunk", lambda *_: 7)
    config = LossConfig(
        divergence=divergence, temperature=1.5, weight=0.7, ramp_start=0, ramp_steps=2, exit_gradient=1.0
    )
    batch = make_batch()._replace(step=step)
    plan = StepPlan(full=1.0, exits=("D",), slots=())
    ours = gradients(tiny_model, [batch], plan, config, teacher)

    tiny_model.zero_grad()
    labels_N, share = batch.labels_BT.flatten(), step / 2
    valid_N = labels_N != -100
    full_NV = tiny_model(batch.tokens_BT).flatten(0, 1)[valid_N]
    exit_NV = tiny_model(batch.tokens_BT, MEMBERS["D"]).flatten(0, 1)[valid_N]
    pairs = ((teacher(batch.tokens_BT).flatten(0, 1)[valid_N], full_NV), (full_NV.detach(), exit_NV))
    for target_NV, student_NV in pairs:
        text = F.cross_entropy(student_NV, labels_N[valid_N])
        apart = DIVERGENCES[divergence](target_NV, student_NV, 1.5).mean()
        ((1 - share) * text + share * 0.7 * apart).backward()
    theirs = {name: one.grad for name, one in tiny_model.named_parameters() if one.grad is not None}
    assert_same(ours, theirs)


def test_a_mixture_trains_as_the_member_that_it_is(tiny_model: ElasticLM) -> None:
    """Layers 1 and 2 at full width, and there without what the smaller member owns."""
    own(tiny_model, {"S": MEMBERS["S"]}, Ownership(norms=True, rank=2), torch.Generator().manual_seed(0))
    slot = Slot("S", range(8), mixture=Mixture("XL", (1, 2)))
    ours = gradients(tiny_model, [make_batch()], StepPlan(full=0.0, exits=(), slots=(slot,)))
    named = Granularity.parse("ffn=0.125:1:1:0.125", {})
    family = {**MEMBERS, "S": named}
    tiny_model.zero_grad()
    plan = StepPlan(full=0.0, exits=(), slots=(Slot("S", range(8)),))
    joint_loss(tiny_model, family, make_batch(), plan, RAMPED, block=3).total.backward()
    theirs = {name: one.grad for name, one in tiny_model.named_parameters() if one.grad is not None}
    assert_same(ours, theirs)
    moved = {name for name, gradient in ours.items() if gradient.abs().max() > 0}
    layers = {name.split(".layers.")[1][0] for name in moved if is_owned(name) and ".layers." in name}
    assert layers == {"0", "3"}


@pytest.mark.parametrize(
    ("member", "shift", "depths"),
    [("ffn=0.125", None, (1, 2, 3)), ("ffn=0.125", 1, (1, 2, 3)), ("ffn=0.5,layers=0:2-3", None, (2, 3))],
)
def test_hidden_states_learn_from_what_the_next_layer_reads_in_the_full_model(
    tiny_model: ElasticLM, member: str, shift: int | None, depths: tuple[int, ...]
) -> None:
    """Here by cosines written plainly; a member that skips a layer learns to hand over what that makes."""
    members = {"S": Granularity.parse(member), "XL": FULL}
    batch = make_batch()
    plan = StepPlan(full=0.0, exits=(), slots=(Slot("S", range(1, 7), 2.0, shift=shift),))
    with_hidden, without = (
        joint_loss(tiny_model, members, batch, plan, RAMPED, block=99, hidden=hidden).total
        for hidden in (1.5, 0.0)
    )
    rows = slice(1, 7)
    counts = range(1, len(depths) + 1)
    *ours, our_last = tiny_model.states(batch.tokens_BT[rows], members["S"], exits=counts)
    *theirs, their_last = tiny_model.states(batch.tokens_BT[rows], exits=depths)
    pairs = [*zip(ours, theirs, strict=True), (tiny_model.norm(our_last), tiny_model.norm(their_last))]
    valid = batch.labels_BT[rows] != -100
    sums = [sum(1 - torch.cosine_similarity(*pair, dim=-1)[valid]) for pair in pairs]
    expected = 1.5 * 2.0 * (sums[-1] + sum(sums[:-1]) / len(depths)) / batch.num_valid
    torch.testing.assert_close(with_hidden - without, expected, atol=1e-5, rtol=1e-4)


def test_hidden_states_pull_at_what_is_shared_as_hard_as_told_and_leave_the_rest(
    tiny_model: ElasticLM,
) -> None:
    batch, plan = make_batch(), StepPlan(full=1.0, exits=("D",), slots=(Slot("S", range(8)),))
    kinder = dataclasses.replace(RAMPED, narrow_gradient=0.15)
    hard, hard_without, kind, kind_without = (
        gradients(tiny_model, [batch], plan, config, hidden=hidden)
        for config in (RAMPED, kinder)
        for hidden in (1.5, 0.0)
    )
    layer = "model.layers.1.mlp.down_proj.weight"
    pull, kind_pull = hard[layer] - hard_without[layer], kind[layer] - kind_without[layer]
    width = int(tiny_model.config.intermediate_size * 0.125)
    assert pull[:, :width].abs().max() > 1e-4
    assert not pull[:, width:].any(), "the full model's states are a target, and get no gradient"
    torch.testing.assert_close(kind_pull, pull / 2, atol=1e-6, rtol=1e-3)


def test_a_teacher_gets_no_gradient_and_scores_a_chunk_at_a_time(
    tiny_model: ElasticLM, teacher: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "rows_per_chunk", lambda *_: 10)
    teacher.requires_grad_(True)  # even if nobody has frozen it
    seen: list[int] = []
    kept: list[bool] = []
    teacher.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[0]))
    for part in (*teacher.model.layers, teacher.lm_head):
        part.register_forward_hook(lambda *call: kept.append(call[2].requires_grad))
    gradients(tiny_model, [make_batch()], StepPlan(full=1.0, exits=(), slots=()), teacher=teacher)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(kept), "nothing is kept for a backward pass"
    assert (max(seen), sum(seen)) == (10, make_batch().num_valid), "positions without a label are not scored"


def test_a_teacher_that_has_nothing_to_say_runs_no_pass(tiny_model: ElasticLM, teacher: ElasticLM) -> None:
    """Before the ramp, and in a step that does not train the full model."""
    batch, everyone = make_batch(), StepPlan(full=1.0, exits=("D",), slots=())
    alone = StepPlan(full=0.0, exits=(), slots=(Slot("S", range(8)),))
    teacher.lm_head.register_forward_hook(lambda *_: pytest.fail("it ran"))
    later = LossConfig(ramp_start=batch.step)
    for plan, config in ((everyone, later), (alone, RAMPED)):
        assert_same(
            gradients(tiny_model, [batch], plan, config, teacher),
            gradients(tiny_model, [batch], plan, config),
        )


def test_an_exit_trains_like_a_pass_of_its_own(tiny_model: ElasticLM) -> None:
    """The full pass's states after k layers are the member's own: same gradients, for the price of a head."""
    batch = make_batch()
    from_states = gradients(tiny_model, [batch], StepPlan(full=1.0, exits=("D",), slots=()))
    own_pass = gradients(tiny_model, [batch], StepPlan(full=1.0, exits=(), slots=(Slot("D", range(8)),)))
    assert_same(from_states, own_pass)


def test_the_full_model_s_own_loss_counts_by_its_factor(tiny_model: ElasticLM, teacher: ElasticLM) -> None:
    batch = make_batch()
    once = gradients(tiny_model, [batch], StepPlan(full=1.0, exits=(), slots=()), teacher=teacher)
    thrice = gradients(tiny_model, [batch], StepPlan(full=3.0, exits=(), slots=()), teacher=teacher)
    assert_same(thrice, {name: 3 * gradient for name, gradient in once.items()})


def test_layers_learn_from_an_exit_where_the_full_model_only_teaches(tiny_model: ElasticLM) -> None:
    found = gradients(tiny_model, [make_batch()], StepPlan(full=0.0, exits=("D",), slots=()))
    below, above = (found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (1, 2))
    assert below.abs().max() > 0
    assert not above.any()


def test_an_exit_learns_at_its_positions_only(tiny_model: ElasticLM) -> None:
    """One position of four, in every row: as if no other had a label."""
    batch = make_batch()
    some = StepPlan(full=0.0, exits=("D",), slots=(), exit_stride=4, exit_offset=2, exit_weight=3.0)
    labels_N = torch.full_like(batch.labels_BT.flatten(), -100)
    labels_N[2::4] = batch.labels_BT.flatten()[2::4]
    only = batch._replace(labels_BT=labels_N.view_as(batch.labels_BT))
    ours = joint_loss(tiny_model, MEMBERS, batch, some, RAMPED, block=3).terms
    everywhere = StepPlan(full=0.0, exits=("D",), slots=())
    theirs = joint_loss(tiny_model, MEMBERS, only, everywhere, RAMPED, block=3).terms
    assert set(ours) == {"D"}
    torch.testing.assert_close(ours["D"], 3 * theirs["D"])


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_the_size_of_a_chunk_of_logits_changes_nothing(
    tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    batch = make_batch()
    slots = (Slot("S", range(1, 3)), Slot("L", range(3, 8), 2.0, shift=1))
    plan = StepPlan(full=1.0, exits=("D",), slots=slots, exit_stride=4, exit_offset=3)
    whole = gradients(tiny_model, [batch], plan)
    monkeypatch.setattr(objective, "rows_per_chunk", lambda *_: rows)
    assert_same(gradients(tiny_model, [batch], plan), whole)


def test_no_logits_of_all_positions_are_ever_held(
    tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "rows_per_chunk", lambda *_: 10)
    seen: list[int] = []

    def linear(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
        seen.append(len(x_ND))
        return F.linear(x_ND, weight_VD)

    monkeypatch.setattr(objective, "F", SimpleNamespace(linear=linear))
    batch = make_batch()
    gradients(tiny_model, [batch], StepPlan(full=1.0, exits=("D",), slots=(Slot("S", range(2)),)))
    assert max(seen) == 3 * 10  # those of a chunk, of all three students at once


def test_the_teacher_is_not_taught(tiny_model: ElasticLM) -> None:
    """A member's loss moves only the member's weights: here the layers that the exit does not run."""
    late = "model.layers.3.mlp.up_proj.weight"
    batch = make_batch()
    alone = gradients(tiny_model, [batch], StepPlan(full=1.0, exits=(), slots=()))
    joint = gradients(tiny_model, [batch], StepPlan(full=1.0, exits=("D",), slots=()))
    assert torch.equal(alone[late], joint[late])
    early = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(alone[early], joint[early])


def test_terms_are_weighted_sums_over_the_valid_tokens_of_the_step(tiny_model: ElasticLM) -> None:
    """A member on every row: its term is the plain mean of its per-token loss over valid tokens."""
    batch = make_batch()
    plan = StepPlan(full=1.0, exits=("D",), slots=(Slot("S", range(8)), Slot("L", range(3), 8 / 3)))
    losses = joint_loss(tiny_model, MEMBERS, batch, plan, RAMPED, block=3).terms
    labels_N, valid_N = batch.labels_BT.flatten(), batch.labels_BT.flatten() != -100
    target_NV = tiny_model(batch.tokens_BT).flatten(0, 1)
    assert torch.allclose(losses["XL"], cross_entropy(target_NV, labels_N)[valid_N].mean())
    for name in ("S", "D"):
        draft_NV = tiny_model(batch.tokens_BT, MEMBERS[name]).flatten(0, 1)
        value_N = member_loss(draft_NV, labels_N, target_NV, RAMPED, batch.step)
        torch.testing.assert_close(losses[name], value_N[valid_N].mean())
    rows_NV = tiny_model(batch.tokens_BT[:3], MEMBERS["L"]).flatten(0, 1)
    value_N = member_loss(rows_NV, batch.labels_BT[:3].flatten(), target_NV[: len(rows_NV)], RAMPED, 5)
    torch.testing.assert_close(losses["L"], value_N.sum() * (8 / 3) / batch.num_valid)


def test_a_turn_on_the_shared_cache_reads_the_full_pass(tiny_model: ElasticLM) -> None:
    batch = make_batch()
    own = gradients(tiny_model, [batch], StepPlan(full=0.0, exits=(), slots=(Slot("S", range(8)),)))
    shared = gradients(
        tiny_model, [batch], StepPlan(full=0.0, exits=(), slots=(Slot("S", range(8), shift=1),))
    )
    assert not torch.allclose(
        own["model.layers.2.mlp.up_proj.weight"], shared["model.layers.2.mlp.up_proj.weight"]
    )
    # With blocks as long as the text nothing is read from the full pass, and both are one.
    plan = StepPlan(full=0.0, exits=(), slots=(Slot("S", range(8), shift=0),))
    tiny_model.zero_grad()
    loss = joint_loss(tiny_model, MEMBERS, batch, plan, RAMPED, block=99).terms["S"]
    plain = joint_loss(
        tiny_model,
        MEMBERS,
        batch,
        StepPlan(full=0.0, exits=(), slots=(Slot("S", range(8)),)),
        RAMPED,
        block=3,
    ).terms["S"]
    torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize("slots", [(), (Slot("S", range(8, 16)),)], ids=["none", "elsewhere"])
def test_a_micro_batch_in_which_nobody_learns_has_no_loss(
    tiny_model: ElasticLM, slots: tuple[Slot, ...]
) -> None:
    """As where the full model only teaches, and the members' rows are in another micro-batch."""
    plan = StepPlan(full=0.0, exits=(), slots=slots)
    loss = joint_loss(tiny_model, MEMBERS, make_batch(), plan, RAMPED, block=3, hidden=1.5)
    assert loss.terms == {}
    assert loss.total.item() == 0
    assert not loss.total.requires_grad


def test_recording_keeps_the_rows_of_its_turn(tiny_model: ElasticLM) -> None:
    batch = make_batch()
    recording = Recording()
    tiny_model(batch.tokens_BT, FULL, recording)
    part = recording.rows(slice(2, 5))
    assert torch.equal(part.layers[1][0], recording.layers[1][0][2:5])


@pytest.mark.parametrize("kind", ["rows", "all", "random", "sandwich"])
@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("hidden", [0.0, 1.5])
def test_processes_share_the_gradient_of_a_step_and_all_run_the_same_members(
    tiny_model: ElasticLM, kind: Any, processes: int, hidden: float
) -> None:
    plans = {name: granularity.resolve(tiny_model.config) for name, granularity in MEMBERS.items()}
    batch = make_batch()
    plan = plan_step(plans, SamplerConfig(kind=kind, row_fraction=0.5), seed=0, step=5, num_rows=8)
    parts = share(batch, processes)

    whole = gradients(tiny_model, [batch], plan, hidden=hidden)
    assert_same(gradients(tiny_model, parts, plan, hidden=hidden), whole)
    names = [list(joint_loss(tiny_model, MEMBERS, part, plan, RAMPED, block=3).terms) for part in parts]
    assert all(one == names[0] for one in names), "FSDP's processes would wait for each other for ever"


@pytest.mark.parametrize(
    ("factor", "scaled"),
    [
        ({"narrow_gradient", "exit_gradient"}, "model.layers"),
        ({"head_gradient"}, "lm_head"),
    ],
)
def test_members_pull_at_shared_weights_by_a_factor(
    tiny_config: ElasticConfig, factor: set[str], scaled: str
) -> None:
    """Gradients are linear in the factor where it scales, and the same where it does not."""
    model = ElasticLM(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    model.init_weights(torch.Generator().manual_seed(0))
    own(model, MEMBERS, Ownership(norms=True))
    plan = StepPlan(full=1.0, exits=("D",), slots=(Slot("S", range(4)), Slot("L", range(4, 8))))

    def changed(keys: set[str], value: float) -> LossConfig:
        settings: dict[str, Any] = dict.fromkeys(keys, value)
        return dataclasses.replace(RAMPED, **settings)

    whole, half, quarter = (
        gradients(model, [make_batch()], plan, changed(factor, value)) for value in (1.0, 0.5, 0.25)
    )
    here = [name for name in whole if name.startswith(scaled)]
    assert_same(
        {name: whole[name] - half[name] for name in here},
        {name: 2 * (half[name] - quarter[name]) for name in here},
    )
    other = "lm_head" if scaled == "model.layers" else "model.layers"
    assert_same(*({name: one[name] for name in one if name.startswith(other)} for one in (half, whole)))
    assert all(whole[name].any() for name in whole if name.startswith("owned"))
