"""The joint objective: the full model's cross-entropy plus a distillation loss for every member.

    one full pass ──┬─ states after k layers ─ head ─ loss of exit k     (every row)
                    ├─ keys and values ─ members that train on the shared cache
                    └─ logits, detached ─ the teacher of all of them
    some rows ─ a pass of each narrow member ─ loss                      (a share of the rows)

Sums over tokens, divided once by the number of valid tokens of the whole optimizer step: splitting
the step into micro-batches changes nothing. A member that trains on a share of the rows is weighed by
its turn (train/sampler.py).

N tokens, B rows, T positions, D model, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from models.cache import Recording, SharedPrefix, block_starts
from models.elastic import ElasticLM
from models.granularity import FULL, Granularity
from train.losses import cross_entropy, member_loss
from train.recipe import LossConfig
from train.sampler import StepPlan, Turn


class Batch(NamedTuple):
    """Rows of one optimizer step, or a part of them.

    Args:
        tokens_BT: token ids.
        labels_BT: the next tokens; -100 where there is none.
        step: the optimizer step.
        first_row: place of the first row among the rows of the step.
        num_rows: rows of the whole step, over all micro-batches and processes.
        num_valid: valid labels of the whole step: the one divisor.
        stride: places from one row to the next: the number of processes that share the micro-batch.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    step: int
    first_row: int
    num_rows: int
    num_valid: int
    stride: int = 1


def joint_loss(
    model: ElasticLM,
    members: Mapping[str, Granularity],
    batch: Batch,
    plan: StepPlan,
    config: LossConfig,
    *,
    block: int,
) -> dict[str, Tensor]:
    """Loss terms of one micro-batch by member's name, to be summed and differentiated.

    Args:
        model: the elastic model; run under autocast by the caller if at all.
        members: every granularity that the plan names, the full one among them.
        batch: tokens and the step's divisors.
        plan: who trains on which rows.
        config: the members' loss.
        block: positions of a block for members that train on the shared cache.
    """
    full = next(name for name, granularity in members.items() if granularity == FULL)
    exits = {name: len(members[name].layers or ()) for name in plan.exits}
    turns = [_part_here(turn, batch) for turn in plan.turns if _is_here(turn, batch)]
    losses: dict[str, Tensor] = {}

    recording = Recording() if any(turn.shift is not None for turn, _ in turns) else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and plan.full):
        *states, last_BTD = model.states(
            batch.tokens_BT, FULL, recording, exits=tuple(sorted(set(exits.values())))
        )
        logits_BTV = model.head(last_BTD)
    if plan.full:
        per_token_N = cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())
        losses[full] = per_token_N.sum() / batch.num_valid
    teacher_BTV = logits_BTV.detach()

    by_depth = dict(zip(sorted(set(exits.values())), states, strict=True))
    for name, depth in exits.items():
        exit_BTV = model.head(by_depth[depth])
        losses[name] = _member_term(exit_BTV, teacher_BTV, batch, slice(None), config)
    for turn, rows in turns:
        tokens_BT = batch.tokens_BT[rows]
        memory = _memory(recording, rows, tokens_BT.shape[1], turn, block)
        member_BTV = model(tokens_BT, members[turn.name], memory)
        term = _member_term(member_BTV, teacher_BTV[rows], batch, rows, config)
        losses[turn.name] = term * turn.weight
    return losses


def _is_here(turn: Turn, batch: Batch) -> bool:
    """Whether the micro-batch has rows of the turn, in this process or another."""
    start = batch.first_row - batch.first_row % batch.stride
    stop = start + batch.tokens_BT.shape[0] * batch.stride
    return turn.rows.start < stop and start < turn.rows.stop


def _part_here(turn: Turn, batch: Batch) -> tuple[Turn, slice]:
    """The turn and its rows of the step as rows of this process.

    A process that has none of them runs one row with weight 0: processes that share out a model's
    weights must all run the same layers, and they wait for the slowest one anyway.
    """
    num_here = batch.tokens_BT.shape[0]
    first, last = (
        min(max(-((batch.first_row - place) // batch.stride), 0), num_here)
        for place in (turn.rows.start, turn.rows.stop)
    )
    if first == last:
        return dataclasses.replace(turn, weight=0.0), slice(0, 1)
    return turn, slice(first, last)


def _memory(
    recording: Recording | None, rows: slice, num_positions: int, turn: Turn, block: int
) -> SharedPrefix | None:
    if turn.shift is None or recording is None:
        return None
    starts_T = block_starts(num_positions, block, turn.shift)
    device = next(iter(recording.layers.values()))[0].device
    return SharedPrefix(recording.rows(rows), starts_T.to(device))


def _member_term(
    logits_BTV: Tensor, teacher_BTV: Tensor, batch: Batch, rows: slice, config: LossConfig
) -> Tensor:
    labels_N = batch.labels_BT[rows].flatten()
    per_token_N = member_loss(
        logits_BTV.flatten(0, 1), labels_N, teacher_BTV.flatten(0, 1), config, batch.step
    )
    return per_token_N.sum() / batch.num_valid
