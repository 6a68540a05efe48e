"""The joint objective: the full model's own loss plus a distillation loss for every member.

    one full pass ──┬─ last states ──────────────────────────────────────┐
                    ├─ states after k layers, at a share of the positions ┤
                    └─ keys and values ─┐                                 ├─ head ─ losses
    a share of the rows ─ a pass of each narrow member ─ states ──────────┤
    a teacher's pass, if there is one, which is not trained ─ states ─────┘

The vocabulary head runs last, for everyone together and a few positions at a time: a piece's logits of
the full model, detached, teach the members of that piece, and are let go (train/objective/chunked_loss.py).
The full model learns from the text, and from a separate, frozen teacher's logits of the piece if the run has
one.

Sums over tokens, divided once by the number of valid tokens of the whole optimizer step: splitting
the step into micro-batches changes nothing. A member that trains on a share of the step is weighed by
its slot (train/objective/sampler.py).

N places (positions of all rows, one row after the other), B rows, T positions, D model, V vocabulary,
M learners.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.elastic.cache import Recording, SharedPrefix, block_starts
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.objective.chunked_loss import rows_of_a_piece, sum_by_pieces
from train.objective.losses import cross_entropy, member_loss, ramp
from train.objective.sampler import Slot, StepPlan
from train.recipe.sections import LossConfig


class JointLoss(NamedTuple):
    """What one micro-batch adds to the step's loss.

    Args:
        total: to be differentiated.
        terms: its parts by member's name, detached, for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]


class _Lesson(NamedTuple):
    """A teacher, and its states at all places of the micro-batch."""

    teacher: ElasticLM
    states_ND: Tensor


class _Learner(NamedTuple):
    """The states that a member learns at, the places of the micro-batch where they are, and their weight."""

    name: str
    states_ND: Tensor
    places: range
    weight: float


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
    """Loss of one micro-batch.

    Args:
        model: the elastic model; run under autocast by the caller if at all.
        members: every granularity that the plan names, the full one among them.
        batch: tokens and the step's divisors.
        plan: who trains on which rows and positions.
        config: the members' loss, and with a teacher the full model's.
        block: positions of a block for members that train on the shared cache.
        teacher: a model with the same vocabulary, from which the full model learns; None: from text alone.
    """
    full = next(name for name, granularity in members.items() if granularity == FULL)
    depths = {name: len(members[name].layers or ()) for name in plan.exits}
    slots = [_part_here(slot, batch) for slot in plan.slots if _is_here(slot, batch)]
    num_positions = batch.tokens_BT.shape[1]
    assert num_positions % plan.exit_stride == 0, (num_positions, plan.exit_stride)
    places = range(batch.tokens_BT.numel())

    recording = Recording() if any(slot.shift is not None for slot, _ in slots) else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and plan.full):
        *states, last_BTD = model.states(
            batch.tokens_BT, FULL, recording, exits=tuple(sorted(set(depths.values())))
        )
    by_depth = dict(zip(sorted(set(depths.values())), states, strict=True))

    learners = [_Learner(full, last_BTD.flatten(0, 1), places, float(plan.full))]
    for name, depth in depths.items():
        some = places[plan.exit_offset :: plan.exit_stride]
        states_ND = by_depth[depth].flatten(0, 1)[plan.exit_offset :: plan.exit_stride]
        learners.append(_Learner(name, states_ND, some, plan.exit_weight))
    for slot, rows in slots:
        memory = _memory(recording, rows, num_positions, slot, block)
        states_BTD = model.states(batch.tokens_BT[rows], members[slot.name], memory)[-1]
        some = places[rows.start * num_positions : rows.stop * num_positions]
        learners.append(_Learner(slot.name, states_BTD.flatten(0, 1), some, slot.weight))
    lesson = None
    if teacher is not None and plan.full and ramp(batch.step, config) > 0:
        with torch.no_grad():
            lesson = _Lesson(teacher, teacher.states(batch.tokens_BT)[-1].flatten(0, 1))
    return _score(model, learners, batch, config, lesson)


def _score(
    model: ElasticLM,
    learners: Sequence[_Learner],
    batch: Batch,
    config: LossConfig,
    lesson: _Lesson | None,
) -> JointLoss:
    """Logits and losses of all learners, piece by piece; the first learner teaches the others."""
    labels_N = batch.labels_BT.flatten()
    size = rows_of_a_piece(model.config.vocab_size, labels_N.device)
    spans = [range(start, min(start + size, len(labels_N))) for start in range(0, len(labels_N), size)]
    shares = [[_overlap(learner.places, span) for learner in learners] for span in spans]
    columns = [
        model.norm(learner.states_ND).split([len(places) for places in column])
        for learner, column in zip(learners, zip(*shares, strict=True), strict=True)
    ]
    weight_VD = model.lm_head.weight
    if torch.is_autocast_enabled(labels_N.device.type):  # which would cast it for each piece anew
        weight_VD = weight_VD.to(torch.get_autocast_dtype(labels_N.device.type))

    def terms(number: int, last_ND: Tensor, *members_ND: Tensor) -> Tensor:
        span, (_, *shares_here) = spans[number], shares[number]
        labels_n = labels_N[span.start : span.stop]
        # One product for all: an exit's few rows, and their part of the weights' gradient, are slow alone.
        together_NV = F.linear(torch.cat([last_ND, *members_ND]), weight_VD)
        logits_NV, *logits = together_NV.split([len(last_ND), *map(len, members_ND)])
        full_NV = logits_NV.detach()
        if lesson is None:
            loss_N = cross_entropy(logits_NV, labels_n)
        else:
            with torch.no_grad():
                teacher_NV = lesson.teacher.head(lesson.states_ND[span.start : span.stop])
            loss_N = member_loss(logits_NV, labels_n, teacher_NV, config, batch.step)
        sums = [learners[0].weight * loss_N.sum()]
        for learner, places, member_NV in zip(learners[1:], shares_here, logits, strict=True):
            here = slice(places.start - span.start, places.stop - span.start, places.step)
            loss_N = member_loss(member_NV, labels_n[here], full_NV[here], config, batch.step)
            sums.append(learner.weight * loss_N.sum())
        return torch.stack(sums) / batch.num_valid

    total, terms_M = sum_by_pieces(terms, list(zip(*columns, strict=True)), [weight_VD])
    named = {learner.name: term for learner, term in zip(learners, terms_M, strict=True)}
    if not learners[0].weight:
        del named[learners[0].name]
    return JointLoss(total, named)


def _overlap(places: range, span: range) -> range:
    """The places that lie in the span.

    >>> _overlap(range(1, 20, 4), range(8, 16)), _overlap(range(2, 4), range(8, 16))
    (range(9, 17, 4), range(8, 8))
    """
    first = max(0, -((places.start - span.start) // places.step))
    last = max(first, -((places.start - span.stop) // places.step))
    part = places[first:last]
    return part or range(span.start, span.start)


def _is_here(slot: Slot, batch: Batch) -> bool:
    """Whether the micro-batch has rows of the slot, in this process or another."""
    start = batch.first_row - batch.first_row % batch.stride
    stop = start + batch.tokens_BT.shape[0] * batch.stride
    return slot.rows.start < stop and start < slot.rows.stop


def _part_here(slot: Slot, batch: Batch) -> tuple[Slot, slice]:
    """The slot and its rows of the step as rows of this process.

    A process that has none of them runs one row with weight 0: processes that share out a model's
    weights must all run the same layers, and they wait for the slowest one anyway.
    """
    num_here = batch.tokens_BT.shape[0]
    first, last = (
        min(max(-((batch.first_row - place) // batch.stride), 0), num_here)
        for place in (slot.rows.start, slot.rows.stop)
    )
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
