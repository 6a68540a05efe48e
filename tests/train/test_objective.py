from typing import Any

import pytest
import torch
from torch import Tensor

from models.cache import Recording
from models.elastic import ElasticLM
from models.granularity import FULL, Granularity
from train.losses import cross_entropy, member_loss
from train.objective import Batch, joint_loss
from train.recipe import LossConfig, SamplerConfig
from train.sampler import StepPlan, Turn, plan_step

MEMBERS = {
    "S": Granularity.parse("ffn=0.125"),
    "L": Granularity.parse("ffn=0.5,heads=0.5"),
    "D": Granularity.parse("layers=0-1"),
    "XL": FULL,
}
RAMPED = LossConfig(divergence="neg_log_alpha", ramp_start=0, ramp_steps=2)
SUM_ORDER = 1e-6
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
    model: ElasticLM, batches: list[Batch], plan: StepPlan, config: LossConfig = RAMPED
) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        losses = joint_loss(model, MEMBERS, batch, plan, config, block=3)
        torch.stack(list(losses.values())).sum().backward()
    return {
        name: parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
        for name, parameter in model.named_parameters()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    assert largest > 0
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=SUM_ORDER * largest * 10, rtol=0)


@pytest.mark.parametrize("kind", ["rows", "all", "random", "sandwich"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_of_any_number_give_the_gradient_of_the_whole_step(
    tiny_model: ElasticLM, kind: Any, parts: int
) -> None:
    """Law 6: one divisor, the valid tokens of the step, though rows hold different numbers of them."""
    plans = {name: granularity.resolve(tiny_model.config) for name, granularity in MEMBERS.items()}
    config = SamplerConfig(kind=kind, share=0.5, shared_cache=0.5)
    batch = make_batch()
    for step in range(3):
        plan = plan_step(plans, config, seed=0, step=step, num_rows=8)
        whole = gradients(tiny_model, [batch], plan)
        assert_same(gradients(tiny_model, split(batch, parts), plan), whole)


def test_an_exit_trains_like_a_pass_of_its_own(tiny_model: ElasticLM) -> None:
    """The full pass's states after k layers are the member's own: same gradients, for the price of a head."""
    batch = make_batch()
    from_states = gradients(tiny_model, [batch], StepPlan(full=True, exits=("D",), turns=()))
    own_pass = gradients(tiny_model, [batch], StepPlan(full=True, exits=(), turns=(Turn("D", range(8)),)))
    assert_same(from_states, own_pass)


def test_the_teacher_is_not_taught(tiny_model: ElasticLM) -> None:
    """A member's loss moves only the member's weights: here the layers that the exit does not run."""
    late = "model.layers.3.mlp.up_proj.weight"
    batch = make_batch()
    alone = gradients(tiny_model, [batch], StepPlan(full=True, exits=(), turns=()))
    joint = gradients(tiny_model, [batch], StepPlan(full=True, exits=("D",), turns=()))
    assert torch.equal(alone[late], joint[late])
    early = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(alone[early], joint[early])


def test_terms_are_weighted_sums_over_the_valid_tokens_of_the_step(tiny_model: ElasticLM) -> None:
    """A member on every row: its term is the plain mean of its per-token loss over valid tokens."""
    batch = make_batch()
    plan = StepPlan(full=True, exits=("D",), turns=(Turn("S", range(8)), Turn("L", range(3), 8 / 3)))
    losses = joint_loss(tiny_model, MEMBERS, batch, plan, RAMPED, block=3)
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
    own = gradients(tiny_model, [batch], StepPlan(full=False, exits=(), turns=(Turn("S", range(8)),)))
    shared = gradients(
        tiny_model, [batch], StepPlan(full=False, exits=(), turns=(Turn("S", range(8), shift=1),))
    )
    assert not torch.allclose(
        own["model.layers.2.mlp.up_proj.weight"], shared["model.layers.2.mlp.up_proj.weight"]
    )
    # With blocks as long as the text nothing is read from the full pass, and both are one.
    plan = StepPlan(full=False, exits=(), turns=(Turn("S", range(8), shift=0),))
    tiny_model.zero_grad()
    loss = joint_loss(tiny_model, MEMBERS, batch, plan, RAMPED, block=99)["S"]
    plain = joint_loss(
        tiny_model,
        MEMBERS,
        batch,
        StepPlan(full=False, exits=(), turns=(Turn("S", range(8)),)),
        RAMPED,
        block=3,
    )["S"]
    torch.testing.assert_close(loss, plain)


def test_recording_keeps_the_rows_of_its_turn(tiny_model: ElasticLM) -> None:
    batch = make_batch()
    recording = Recording()
    tiny_model(batch.tokens_BT, FULL, recording)
    part = recording.rows(slice(2, 5))
    assert torch.equal(part.layers[1][0], recording.layers[1][0][2:5])


@pytest.mark.parametrize("kind", ["rows", "all", "random", "sandwich"])
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_the_gradient_of_a_step_and_all_run_the_same_members(
    tiny_model: ElasticLM, kind: Any, processes: int
) -> None:
    plans = {name: granularity.resolve(tiny_model.config) for name, granularity in MEMBERS.items()}
    batch = make_batch()
    plan = plan_step(plans, SamplerConfig(kind=kind, share=0.5), seed=0, step=5, num_rows=8)
    parts = share(batch, processes)

    assert_same(gradients(tiny_model, parts, plan), gradients(tiny_model, [batch], plan))
    names = [list(joint_loss(tiny_model, MEMBERS, part, plan, RAMPED, block=3)) for part in parts]
    assert all(one == names[0] for one in names), "FSDP's processes would wait for each other for ever"
