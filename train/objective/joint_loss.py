"""The joint objective: the full model's own loss plus a distillation loss for every member.

    one full pass ──┬─ last states ───────────────────────────────────────────┐
                    ├─ states after k layers, at a fraction of the positions ─┤
                    └─ keys and values ─┐                                     ├─ head ─ losses
    a fraction of the rows ─ a pass of each narrow member ─ states ───────────┤
    a teacher's pass, if there is one, which is not trained ─ states ─────────┘

The vocabulary head runs last, for all students together and a chunk of positions at a time: the full model's
logits of a chunk, detached, teach the members in that chunk, and are freed (train/objective/chunked_loss.py).
A narrow member may learn from the full model's hidden states as well, layer by layer, on its rows.
The full model learns from the text, and from the logits of a separate, frozen teacher if the run has one.

Losses are sums over tokens, divided once by the number of valid tokens of the whole optimizer step: splitting
the step into micro-batches changes nothing. A member that trains on a part of the step is weighted by its
slot (train/objective/sampler.py).

N positions (of all rows, one row after the other), B rows, T positions of a row, D model, V vocabulary,
M students.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.base.labels import IGNORE_INDEX
from models.elastic.cache import Recording, SharedPrefix, block_starts
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.ops import scale_gradient
from train.data.batch import Batch
from train.objective.chunked_loss import rows_per_chunk, sum_by_chunks
from train.objective.losses import cross_entropy, hidden_loss, member_loss, ramp, taught_loss
from train.objective.positions import Index, index_of, kept_of, within
from train.objective.sampler import Slot, StepPlan
from train.objective.teacher import Targets, Teacher
from train.recipe.sections import LossConfig


class JointLoss(NamedTuple):
    """The part of the step's loss that one micro-batch adds.

    Args:
        total: The sum, to be differentiated.
        terms: Its parts by member's name, detached, for the log; without what hidden states add.
    """

    total: Tensor
    terms: dict[str, Tensor]


class _Student(NamedTuple):
    """A model where it is trained, and how its loss counts.

    Args:
        name: The member.
        states_ND: What the vocabulary head reads of it.
        positions: The positions in the micro-batch.
        weight: Factor of its loss.
        hidden_loss: How its hidden states differ from the full model's, summed over positions with a label
            and weighted; None if that is not asked.
    """

    name: str
    states_ND: Tensor
    positions: Sequence[int]
    weight: float
    hidden_loss: Tensor | None = None


def joint_loss(
    model: ElasticLM,
    members: Mapping[str, Granularity],
    batch: Batch,
    plan: StepPlan,
    config: LossConfig,
    *,
    block: int,
    teacher: Teacher | None = None,
    full_config: LossConfig | None = None,
    hidden: float = 0.0,
) -> JointLoss:
    """Return the loss of one micro-batch.

    Args:
        model: The elastic model; run under autocast by the caller if at all.
        members: Every granularity that the plan names, the full one among them.
        batch: Tokens and the step's divisors.
        plan: The students with their rows and positions.
        config: The members' loss, and with a teacher the full model's.
        block: Positions of a block for members that train on the shared cache.
        teacher: Of the same vocabulary; the full model learns from it. None: from text alone.
        full_config: The full model's loss with a teacher, where it is not that of the members.
        hidden: Weight of how narrow members' hidden states differ from the full model's.
    """
    slots = [slot for slot in plan.slots if _meet(slot.rows, batch.rows_everywhere)]
    recording = Recording() if any(slot.shift is not None for slot in slots) else None
    students, states = _students_of_full_pass(
        model, members, batch, plan, recording, config, keep_states=bool(slots and hidden)
    )
    for slot in slots:
        granularity = slot.granularity(members, model.config.num_hidden_layers)
        students.append(_student_of_slot(model, granularity, batch, slot, recording, block, config, states))
    del states  # those that no backward pass needs go before logits are made
    own = (full_config or config) if plan.full else None
    taught = own is not None and ramp(batch.step, own) > 0
    targets = teacher.targets(batch) if teacher is not None and taught else None
    if len(students) == 1 and not plan.full:  # nobody learns here
        return JointLoss(batch.tokens_BT.new_zeros((), dtype=torch.float32), {})
    scored = _score(model, students, batch, config, own, targets)
    apart = [student.hidden_loss for student in students if student.hidden_loss is not None]
    return scored._replace(total=scored.total + hidden * sum(apart) / batch.num_valid)


def _students_of_full_pass(
    model: ElasticLM,
    members: Mapping[str, Granularity],
    batch: Batch,
    plan: StepPlan,
    recording: Recording | None,
    config: LossConfig,
    *,
    keep_states: bool,
) -> tuple[list[_Student], list[Tensor]]:
    """Run the full model, and return it and the exits as students.

    The second result has, if they are to be kept, the full model's hidden states [N, D] behind each layer but
    the last, and those that the vocabulary head reads; all detached.
    """
    full = next(name for name, granularity in members.items() if granularity == FULL)
    depth_of = {name: len(members[name].layers or ()) for name in plan.exits}
    every = range(1, model.config.num_hidden_layers)
    depths = tuple(every) if keep_states else tuple(sorted(set(depth_of.values())))
    # An exit has no pass of its own: the layers below it learn from it in this one.
    trains = plan.full > 0 or (bool(plan.exits) and model.model.embed_tokens.weight.requires_grad)
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        *states, last_BTD = model.states(batch.tokens_BT, FULL, recording, exits=depths)
    by_depth = dict(zip(depths, states, strict=True))
    positions = range(batch.tokens_BT.numel())
    last_ND = model.norm(last_BTD.flatten(0, 1))
    students = [_Student(full, last_ND, positions, plan.full)]
    fits = not plan.exits or batch.tokens_BT.shape[1] % plan.exit_stride == 0
    assert fits, (batch.tokens_BT.shape, plan.exit_stride)
    strided = slice(plan.exit_offset, None, plan.exit_stride)  # the same positions of each row
    for name, depth in depth_of.items():
        states_ND = model.norm(by_depth[depth].flatten(0, 1)[strided], members[name])
        students.append(_member(name, states_ND, positions[strided], plan.exit_weight, config, is_exit=True))
    if not keep_states:
        return students, []
    return students, [*(states_BTD.detach().flatten(0, 1) for states_BTD in states), last_ND.detach()]


def _student_of_slot(
    model: ElasticLM,
    granularity: Granularity,
    batch: Batch,
    slot: Slot,
    recording: Recording | None,
    block: int,
    config: LossConfig,
    full_states: Sequence[Tensor],
) -> _Student:
    """Run a member on those rows of its slot that this process has.

    Its hidden states are compared with `full_states`, if there are any: what leaves each of its layers with
    what the full model gives to the layer that the member runs next, and what the vocabulary head reads.

    A process that has none of them runs one row with weight 0: processes that shard a model must all run the
    same layers, and they wait for the slowest one anyway.
    """
    num_positions = batch.tokens_BT.shape[1]
    first, last = bisect_left(batch.rows, slot.rows.start), bisect_left(batch.rows, slot.rows.stop)
    rows, weight = (slice(first, last), slot.weight) if first < last else (slice(0, 1), 0.0)
    memory = None
    if slot.shift is not None and recording is not None:
        starts_T = block_starts(num_positions, block, slot.shift)
        memory = SharedPrefix(recording.rows(rows), starts_T.to(batch.tokens_BT.device))
    layers = granularity.resolve(model.config).layers
    depths = range(1, len(layers)) if full_states else ()
    *between, last_BTD = model.states(batch.tokens_BT[rows], granularity, memory, exits=depths)
    positions = range(rows.start * num_positions, rows.stop * num_positions)
    states_ND = model.norm(last_BTD.flatten(0, 1), granularity)
    student = _member(slot.name, states_ND, positions, weight, config, is_exit=False)
    if not full_states:
        return student
    own = [*(states_BTD.flatten(0, 1) for states_BTD in between), states_ND]
    theirs = [*(full_states[layer.index - 1] for layer in layers[1:]), full_states[-1]]
    here = slice(positions.start, positions.stop)
    *differences, last_P = (
        hidden_loss(ours_PD, full_ND[here]) for ours_PD, full_ND in zip(own, theirs, strict=True)
    )
    loss_P = last_P + torch.stack(differences).mean(0) if differences else last_P
    has_label_P = batch.labels_BT[rows].flatten() != IGNORE_INDEX
    pull = scale_gradient((loss_P * has_label_P).sum(), config.narrow_gradient)
    return student._replace(hidden_loss=weight * pull)


def _member(
    name: str,
    states_ND: Tensor,
    positions: range,
    weight: float,
    config: LossConfig,
    *,
    is_exit: bool,
) -> _Student:
    """Return a member as a student, its gradients scaled before they reach what it shares.

    Its loss is scaled for the vocabulary head's sake and its states' gradient for the layers' sake. What it
    owns is scaled with them, which AdamW does not notice.
    """
    factor = config.exit_gradient if is_exit else config.narrow_gradient
    scaled_ND = scale_gradient(states_ND, factor / config.head_gradient)
    return _Student(name, scaled_ND, positions, weight * config.head_gradient)


def _score(
    model: ElasticLM,
    students: Sequence[_Student],
    batch: Batch,
    config: LossConfig,
    own: LossConfig | None,
    targets: Targets | None,
) -> JointLoss:
    """Return the losses of all students, made chunk by chunk; the first student is the full model."""
    labels_N = batch.labels_BT.flatten()
    text_N = labels_N
    if batch.written_BT is not None:
        text_N = labels_N.masked_fill(batch.written_BT.flatten(), IGNORE_INDEX)
    kept_K = None
    if batch.num_valid < batch.num_rows * batch.tokens_BT.shape[1]:  # asked of numbers: no device waits
        is_kept_N = labels_N != IGNORE_INDEX
        kept_K = is_kept_N.nonzero().squeeze(1)
        students = [_kept(student, is_kept_N) for student in students]
        labels_N, text_N = labels_N[kept_K], text_N[kept_K]
    size = rows_per_chunk(model.config.vocab_size, labels_N.device)
    starts = range(0, max(1, len(labels_N)), size)
    chunks = [range(start, min(start + size, len(labels_N))) for start in starts]
    parts = [[within(student.positions, chunk) for student in students] for chunk in chunks]
    states = [
        student.states_ND.split([len(part) for part in parts_of_student])
        for student, parts_of_student in zip(students, zip(*parts, strict=True), strict=True)
    ]
    weight_VD = model.lm_head.weight
    if torch.is_autocast_enabled(labels_N.device.type):  # which would cast it again for each chunk
        weight_VD = weight_VD.to(torch.get_autocast_dtype(labels_N.device.type))

    def terms(number: int, *states_ND: Tensor) -> Tensor:
        chunk = chunks[number]
        here = slice(chunk.start, chunk.stop)
        places = here if kept_K is None else kept_K[here]
        rows = [index_of(part, chunk.start) for part in parts[number]]
        # One product for all: an exit's few rows, and their part of the weights' gradient, are slow alone.
        packed_NV = F.linear(torch.cat(states_ND), weight_VD)
        logits = packed_NV.split([len(states) for states in states_ND])
        losses = _losses(logits, rows, labels_N[here], text_N[here], places, targets, config, own, batch.step)
        sums = [student.weight * loss_N.sum() for student, loss_N in zip(students, losses, strict=True)]
        return torch.stack(sums) / batch.num_valid

    total, terms_M = sum_by_chunks(terms, list(zip(*states, strict=True)), [weight_VD])
    named = {student.name: term for student, term in zip(students, terms_M, strict=True)}
    if not students[0].weight:
        del named[students[0].name]
    return JointLoss(total, named)


def _losses(
    logits: Sequence[Tensor],
    rows: Sequence[Index],
    labels_N: Tensor,
    text_N: Tensor,
    here: Index,
    targets: Targets | None,
    config: LossConfig,
    own: LossConfig | None,
    step: int,
) -> Iterator[Tensor]:
    """Yield each student's losses in a chunk: the full model teaches the others, and may have a teacher."""
    full_NV = logits[0].detach()
    if own is None:  # it teaches, and does not learn
        yield logits[0].new_zeros(1)
    elif targets is None:
        yield cross_entropy(logits[0], text_N)
    else:
        from_teacher = partial(targets.divergence, here, logits[0], own)
        yield taught_loss(logits[0], labels_N, from_teacher, own, step, text_N)
    for member_NV, part in zip(logits[1:], rows[1:], strict=True):
        yield member_loss(member_NV, labels_N[part], full_NV[part], config, step, text_N[part])


def _kept(student: _Student, is_kept_N: Tensor) -> _Student:
    """Return a student at the positions that have a label, which are numbered from 0."""
    assert isinstance(student.positions, range), student.positions
    is_kept_P, positions = kept_of(student.positions, is_kept_N)
    return student._replace(states_ND=student.states_ND[is_kept_P], positions=positions)


def _meet(rows: range, others: range) -> bool:
    """Return whether two spans of rows have a row in common."""
    return rows.start < others.stop and others.start < rows.stop
