"""Rows that the student (or its teacher) continues itself, in place of the text's own continuation.

On-policy distillation (https://arxiv.org/abs/2306.13649; of drafts, https://arxiv.org/abs/2310.08461): the
student learns from the teacher where its own words lead. Written by the teacher, it is sequence-level
distillation (https://arxiv.org/abs/1606.07947).

    steps      0 1 2 3 │ 4 5 6 7 │ ...         replay_steps = 4
    written at 0       │ 4       │             for all steps up to the next line, by the batched decoder

The rows of a window are a function of the weights at its first step, of seed and step; a state keeps those
that are not used yet, so that a run which goes on equals one that was not stopped. Where several processes
train, each writes all rows and takes its own, so that they agree and any one's state holds them all.

B rows, T positions, P tokens of the prompt.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.base.errors import UsageError
from models.decode.engine.draft import NestedDraft
from models.decode.engine.engine import stream_batch
from models.decode.engine.policy import Fixed
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import Model, View
from models.packed.quantize import pack
from train.data.batch import Batch
from train.objective.teacher import ElasticTeacher, Teacher, frozen
from train.recipe.recipe import Recipe

GAMMA = 3
"""Tokens that a member drafts a round."""
MOST_ROWS = 64
"""Rows that are written together."""
STUDENT, TEACHER = "student", "teacher"


class WrittenRows:
    """The written rows of a run; see above.

    Args:
        recipe: its `distill`, `seed` and the sizes of a step.
        batch_at: gives the micro-batch of a step and a number, from the text, with the rows of all processes.
        precision: the dtype that texts are written in, `fp32` or `bf16`.
        kept: rows of later steps that a state kept, by `replay`.
        teacher: writes, where the recipe says so.
    """

    def __init__(
        self,
        recipe: Recipe,
        batch_at: Callable[[int, int], Batch],
        precision: str,
        kept: Mapping[str, Tensor] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.recipe, self.config = recipe, recipe.distill
        self.batch_at, self.precision = batch_at, precision
        self.rows = written_rows(self.config.written_fraction, recipe.trainer.rows_per_step)
        self.tokens = {int(step): tokens_RT for step, tokens_RT in (kept or {}).items()}
        self.teacher = _writer(teacher) if self.config.writer == TEACHER else None

    @property
    def replay(self) -> dict[str, Tensor]:
        """The rows that are not used yet, by step."""
        return {str(step): tokens_RT for step, tokens_RT in self.tokens.items()}

    def drop_until(self, step: int) -> None:
        """Forget the rows of the steps before one."""
        self.tokens = {key: tokens_RT for key, tokens_RT in self.tokens.items() if key >= step}

    def mix(self, batch: Batch, model: ElasticLM, members: Mapping[str, Granularity]) -> Batch:
        """Return the batch with its written rows, which are written first if none are left."""
        self.drop_until(batch.step)
        if batch.step not in self.tokens:
            self._write(batch.step, model, members)
        mine = {row: number for number, row in enumerate(self.rows) if row in batch.rows}
        if not mine:
            return batch
        places = torch.tensor([batch.rows.index(row) for row in mine])
        own_RT = self.tokens[batch.step][list(mine.values())].to(batch.tokens_BT.device)
        tokens_BT, labels_BT = batch.tokens_BT.clone(), batch.labels_BT.clone()
        tokens_BT[places] = own_RT
        next_RT = torch.cat([own_RT[:, 1:], own_RT[:, :1]], 1)  # the last position has no label: any will do
        labels_BT[places] = torch.where(labels_BT[places] < 0, labels_BT[places], next_RT)
        written_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
        written_BT[places, self.config.prompt_tokens - 1 :] = self.teacher is None
        written_BT[places, -1] = True
        return batch._replace(tokens_BT=tokens_BT, labels_BT=labels_BT, written_BT=written_BT)

    def _write(self, step: int, model: ElasticLM, members: Mapping[str, Granularity]) -> None:
        window = self.config.replay_steps
        steps = range(step, min((step // window + 1) * window, self.recipe.trainer.max_steps))
        prompts = [prompt for one in steps for prompt in self._prompts(one)]
        with frozen(model.device):
            rows = self._continue(prompts, step, model, members)
        size = len(self.rows)
        tokens = torch.tensor(rows)
        for number, one in enumerate(steps):
            self.tokens[one] = tokens[number * size : (number + 1) * size].clone()

    def _prompts(self, step: int) -> list[list[int]]:
        size = self.recipe.trainer.batch_size
        micros = {row // size: self.batch_at(step, row // size) for row in self.rows}
        length = self.config.prompt_tokens
        return [micros[row // size].tokens_BT[row % size, :length].tolist() for row in self.rows]

    def _continue(
        self, prompts: list[list[int]], step: int, model: ElasticLM, members: Mapping[str, Granularity]
    ) -> list[list[int]]:
        """Return whole rows: the prompts and what follows them, ends of documents included."""
        packed = pack(self.teacher or model, self.precision)
        target, draft = _roles(packed, members, self.config.writer)
        key = f"written {self.recipe.seed} {step}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:6])
        rows: list[list[int]] = []
        for first in range(0, len(prompts), MOST_ROWS):
            part = prompts[first : first + MOST_ROWS]
            streams = stream_batch(
                target,
                part,
                new_policy=lambda: Fixed(draft, GAMMA if draft else 0),
                randoms=[SeededRandom(seed, first + row) for row in range(len(part))],
                params=SamplingParams(temperature=1.0),
                max_new_tokens=self.recipe.data.sequence_length - self.config.prompt_tokens,
                eos_token_ids=(),
            )
            rows += [
                [*prompt, *(token.id for token in one)] for prompt, one in zip(part, streams, strict=True)
            ]
        return rows


def written_rows(fraction: float, num_rows: int) -> list[int]:
    """Return which of a step's rows are written, spread evenly.

    >>> written_rows(0.5, 4), written_rows(0.25, 8), written_rows(1.0, 2)
    ([1, 3], [3, 7], [0, 1])
    """
    return [row for row in range(num_rows) if int((row + 1) * fraction + 1e-9) > int(row * fraction + 1e-9)]


def _roles(
    model: ElasticLM, members: Mapping[str, Granularity], writer: str
) -> tuple[Model, NestedDraft | None]:
    """Return who writes, and the smallest early exit of it that drafts, if there is one."""
    if writer == TEACHER:
        return model, None
    granularity = FULL if writer == STUDENT else members[writer]
    plan = granularity.resolve(model.config)
    views = [View(model, one) for one in members.values() if one not in (FULL, granularity)]
    inside = [view for view in views if view.plan.is_layer_prefix and plan.contains(view.plan)]
    draft = min(inside, key=lambda view: len(view.plan.layers), default=None)
    target = model if granularity == FULL else View(model, granularity)
    return target, None if draft is None else NestedDraft(draft)


def _writer(teacher: Any) -> ElasticLM:
    if not isinstance(teacher, ElasticTeacher):
        raise UsageError(
            "distill.writer=teacher: only a teacher that `nestling import` opens writes; set it to student"
        )
    return teacher.model
