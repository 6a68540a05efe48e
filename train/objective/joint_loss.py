"""The joint objective: the full model's own loss plus a distillation loss for every member.

    one full pass ──┬─ last states ───────────────────────────────────────────┐
                    ├─ states after k layers, at a fraction of the positions ─┤
                    └─ keys and values ─┐                                     ├─ head ─ losses
    a fraction of the rows ─ a pass of each narrow member ─ states ───────────┤
    a teacher's pass, if there is one, which is not trained ─ states ─────────┘

The vocabulary head runs last, for all students together and a chunk of positions at a time: the full model's
logits of a chunk, detached, teach the members in that chunk, and are freed (train/objective/chunked_loss.py).
The full model learns from the text, and from the logits of a separate, frozen teacher if the run has one.

Losses are sums over tokens, divided once by the number of valid tokens of the whole optimizer step: splitting
the step into micro-batches changes nothing. A member that trains on a part of the step is weighted by its
slot (train/objective/sampler.py).

N positions (of all rows, one row after the other), B rows, T positions of a row, D model, V vocabulary,
M students.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.elastic.cache import Recording, SharedPrefix, block_starts
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.objective.chunked_loss import rows_per_chunk, sum_by_chunks
from train.objective.losses import cross_entropy, member_loss, ramp
from train.objective.sampler import Slot, StepPlan
from train.recipe.sections import LossConfig


class JointLoss(NamedTuple):
    """The part of the step's loss that one micro-batch adds.

    Args:
        total: The sum, to be differentiated.
        terms: Its parts by member's name, detached, for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]


class _Student(NamedTuple):
    """A model's states where it is trained, their positions in the micro-batch, and its loss's weight."""

    name: str
    states_ND: Tensor
    positions: range
    weight: float


class _TeacherSignal(NamedTuple):
    """A teacher, and its states at all positions of the micro-batch."""

    teacher: ElasticLM
    states_ND: Tensor


def joint_loss(
    model: ElasticLM,
    members: Mapping[str, Granularity],
    batch: Batch,
    plan: StepPlan,
    config: LossConfig,
    *,
    block: int,
    teacher: ElasticLM | None = None,
) -> JointLoss:
    """Return the loss of one micro-batch.

    Args:
        model: The elastic model; run under autocast by the caller if at all.
        members: Every granularity that the plan names, the full one among them.
        batch: Tokens and the step's divisors.
        plan: The students with their rows and positions.
        config: The members' loss, and with a teacher the full model's.
        block: Positions of a block for members that train on the shared cache.
        teacher: A model with the same vocabulary, from which the full model learns; None: from text alone.
    """
    full = next(name for name, granularity in members.items() if granularity == FULL)
    slots = [_part_here(slot, batch) for slot in plan.slots if _meet(slot.rows, batch.rows_everywhere)]
    num_positions = batch.tokens_BT.shape[1]
    assert num_positions % plan.exit_stride == 0, (num_positions, plan.exit_stride)

    recording = Recording() if any(slot.shift is not None for slot, _ in slots) else None
    depths = {name: len(members[name].layers or ()) for name in plan.exits}
    with torch.set_grad_enabled(torch.is_grad_enabled() and plan.full):
        *states, last_BTD = model.states(
            batch.tokens_BT, FULL, recording, exits=tuple(sorted(set(depths.values())))
        )
    by_depth = dict(zip(sorted(set(depths.values())), states, strict=True))

    positions = range(batch.tokens_BT.numel())
    students = [_Student(full, last_BTD.flatten(0, 1), positions, float(plan.full))]
    strided = slice(plan.exit_offset, None, plan.exit_stride)  # the stride divides a row: the same in each
    for name, depth in depths.items():
        states_ND = by_depth[depth].flatten(0, 1)[strided]
        students.append(_Student(name, states_ND, positions[strided], plan.exit_weight))
    for slot, rows in slots:
        memory = _memory(recording, rows, num_positions, slot, block)
        states_BTD = model.states(batch.tokens_BT[rows], members[slot.name], memory)[-1]
        here = positions[rows.start * num_positions : rows.stop * num_positions]
        students.append(_Student(slot.name, states_BTD.flatten(0, 1), here, slot.weight))
    signal = None
    if teacher is not None and plan.full and ramp(batch.step, config) > 0:
        with torch.no_grad():
            signal = _TeacherSignal(teacher, teacher.states(batch.tokens_BT)[-1].flatten(0, 1))
    return _score(model, students, batch, config, signal)


def _score(
    model: ElasticLM,
    students: Sequence[_Student],
    batch: Batch,
    config: LossConfig,
    signal: _TeacherSignal | None,
) -> JointLoss:
    """Return the losses of all students, made chunk by chunk; the first student teaches the others."""
    labels_N = batch.labels_BT.flatten()
    size = rows_per_chunk(model.config.vocab_size, labels_N.device)
    chunks = [range(start, min(start + size, len(labels_N))) for start in range(0, len(labels_N), size)]
    parts = [[_within(student.positions, chunk) for student in students] for chunk in chunks]
    states = [
        model.norm(student.states_ND).split([len(part) for part in parts_of_student])
        for student, parts_of_student in zip(students, zip(*parts, strict=True), strict=True)
    ]
    weight_VD = model.lm_head.weight
    if torch.is_autocast_enabled(labels_N.device.type):  # which would cast it again for each chunk
        weight_VD = weight_VD.to(torch.get_autocast_dtype(labels_N.device.type))

    def terms(number: int, last_ND: Tensor, *members_ND: Tensor) -> Tensor:
        chunk, (_, *parts_here) = chunks[number], parts[number]
        labels_n = labels_N[chunk.start : chunk.stop]
        # One product for all: an exit's few rows, and their part of the weights' gradient, are slow alone.
        packed_NV = F.linear(torch.cat([last_ND, *members_ND]), weight_VD)
        logits_NV, *logits = packed_NV.split([len(last_ND), *map(len, members_ND)])
        full_NV = logits_NV.detach()
        if signal is None:
            loss_N = cross_entropy(logits_NV, labels_n)
        else:
            with torch.no_grad():
                teacher_NV = signal.teacher.head(signal.states_ND[chunk.start : chunk.stop])
            loss_N = member_loss(logits_NV, labels_n, teacher_NV, config, batch.step)
        sums = [students[0].weight * loss_N.sum()]
        for student, part, member_NV in zip(students[1:], parts_here, logits, strict=True):
            here = slice(part.start - chunk.start, part.stop - chunk.start, part.step)
            loss_N = member_loss(member_NV, labels_n[here], full_NV[here], config, batch.step)
            sums.append(student.weight * loss_N.sum())
        return torch.stack(sums) / batch.num_valid

    total, terms_M = sum_by_chunks(terms, list(zip(*states, strict=True)), [weight_VD])
    named = {student.name: term for student, term in zip(students, terms_M, strict=True)}
    if not students[0].weight:
        del named[students[0].name]
    return JointLoss(total, named)


def _within(positions: range, span: range) -> range:
    """Return the positions that lie in the span; where there are none, an empty range at its start.

    >>> _within(range(1, 20, 4), range(8, 16)), _within(range(2, 4), range(8, 16))
    (range(9, 17, 4), range(8, 8))
    """
    part = positions[bisect_left(positions, span.start) : bisect_left(positions, span.stop)]
    return part or range(span.start, span.start)


def _meet(rows: range, others: range) -> bool:
    """Return whether two spans of rows have a row in common."""
    return rows.start < others.stop and others.start < rows.stop


def _part_here(slot: Slot, batch: Batch) -> tuple[Slot, slice]:
    """Return the slot with those of its rows that this process has, counted in this process.

    A process that has none of them runs one row with weight 0: processes that shard a model must all run the
    same layers, and they wait for the slowest one anyway.
    """
    first, last = bisect_left(batch.rows, slot.rows.start), bisect_left(batch.rows, slot.rows.stop)
    if first == last:
        return dataclasses.replace(slot, weight=0.0), slice(0, 1)
    return slot, slice(first, last)


def _memory(
    recording: Recording | None, rows: slice, num_positions: int, slot: Slot, block: int
) -> SharedPrefix | None:
    if slot.shift is None or recording is None:
        return None
    starts_T = block_starts(num_positions, block, slot.shift)
    device = next(iter(recording.layers.values()))[0].device
    return SharedPrefix(recording.rows(rows), starts_T.to(device))
