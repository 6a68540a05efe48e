"""How long a step of an arm takes beside one of its full model alone."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from study_arms import ALONE, ARMS, Arm, Run, recipe_of

from models.base.processor import busy_now
from train.bench.trainers import Contender, train_briefly
from train.data.module import TextData
from train.run.malloc import keep_freed_memory
from train.run.speed import training_precision

STEPS = 16
"""Timed steps of an arm in a round: as many as it takes until every member had its rows."""


def time_arms(names: Sequence[str], corpus: str, data: Path, out: Path, *, rounds: int) -> dict[str, float]:
    """Return the time of a step of each arm over that of the full model alone: the median over the rounds.

    Everyone trains a few steps, round after round, so that a disturbance hits each alike; members learn from
    the divergence from the first step on. On a busy machine it is the processor's time.
    """
    keep_freed_memory()
    clock = time.process_time if busy_now() else time.perf_counter
    contenders = {arm.name: _contender(arm, corpus, data, out) for arm in ARMS if arm.name in (ALONE, *names)}
    text = TextData(contenders[ALONE].recipe).prepare()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(train_briefly(contender, text, STEPS, clock))
    alone = taken.pop(ALONE)
    return {
        name: statistics.median(own / full for own, full in zip(seconds, alone, strict=True))
        for name, seconds in taken.items()
    }


def _contender(arm: Arm, corpus: str, data: Path, out: Path) -> Contender:
    recipe = recipe_of(arm, Run(arm.name, corpus, 0), data, out)
    loss = dataclasses.replace(recipe.loss, ramp_start=0, ramp_steps=0)
    recipe = dataclasses.replace(recipe, loss=loss, dtype=training_precision(recipe.dtype))
    return Contender(engine="nestling", mode="joint", recipe=recipe)
