"""`nestling demo`: the whole chain in a few minutes on two cores, from Python's own source.

train a family -> its table -> cut S out, prove it equal in stock transformers
               -> complete a function plainly and with the family's own draft (train/commands/demo_decode.py)

It takes at most six minutes on two slow cores: training has as many steps as fit into three.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.base.errors import NestlingError
from models.checkpoint.folder import load_model
from models.machine.card import machine_card, num_threads
from train.bench.train_bench import choose_contenders
from train.bench.trainers import train_briefly
from train.commands.demo_decode import complete_function
from train.commands.export import extract_and_prove
from train.data.module import TextData
from train.recipe.recipe import Recipe, load_recipe, load_saved_recipe
from train.recipe.shipped import CONFIGS
from train.report.tables import FAMILY_LEGEND, family_table
from train.run.fit import fit
from train.run.identity import RECIPE_FILE
from train.run.speed import training_precision

RECIPE = CONFIGS / "demo.yaml"
MEMBER = "S"
TRAINING_SECONDS = 180
"""Training takes about this long where the recipe's steps would take longer."""
LEAST_STEPS = 300
"""Fewer steps leave nothing to look at."""
TIMED_STEPS = 4


def run_demo(out: Path, console: Console, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run it.

    Args:
        out: the run folder; a finished demo there is replaced, an interrupted one goes on.
        console: shows the progress.
        overrides: recipe keys that differ from configs/demo.yaml.

    Returns:
        What was measured, for JSON.

    Raises:
        NestlingError: if a member cut out is not equal, or a draft changed the text: bugs of ours.
    """
    started = time.perf_counter()
    console.rule("1. train a family on the Python standard library")
    recipe, resume = choose_recipe(out, overrides, console)
    path = fit(recipe, out, resume=resume, console=console)
    folder = load_model(path)
    console.print(family_table(folder.members).to_rich(caption=FAMILY_LEGEND))

    console.rule(f"2. cut {MEMBER} out, and open it in stock transformers")
    parity = extract_and_prove(folder, folder.family[MEMBER], out / MEMBER, console).parity

    console.rule("3. complete a function, plainly and with the family's own draft")
    speed = complete_function(path, console)

    page = _report(out)
    seconds = time.perf_counter() - started
    console.rule(f"done in {seconds / 60:.1f} minutes")
    console.print(_next_steps(out, page), markup=False)
    return {
        "members": [asdict(member) for member in folder.members],
        "extraction": asdict(parity),
        "decoding": speed,
        "seconds": seconds,
    }


def choose_recipe(out: Path, overrides: Sequence[str], console: Console) -> tuple[Recipe, str]:
    """Return the recipe with as many steps as fit into `TRAINING_SECONDS` here, and what to resume from.

    An interrupted demo keeps the number of steps that it began with, and `trainer.max_steps=N` fixes it.
    """
    recipe = load_recipe([RECIPE], overrides)
    waiting = _interrupted(out)
    if waiting is not None and with_steps(recipe, waiting.trainer.max_steps) == waiting:
        return waiting, "auto"
    if recipe.trainer.max_steps == load_recipe([RECIPE]).trainer.max_steps:
        each = _seconds_per_step(recipe, console)
        steps = count_steps(each, most=recipe.trainer.max_steps)
        recipe = with_steps(recipe, steps)
        console.print(f"{steps} steps, which take about {each * steps:.0f} s here")
    return recipe, "never"


def count_steps(seconds_per_step: float, *, most: int) -> int:
    """Return a multiple of fifty steps that fits into `TRAINING_SECONDS`, within bounds.

    >>> count_steps(0.1, most=900), count_steps(0.5, most=900), count_steps(9.0, most=900)
    (900, 350, 300)
    """
    return max(LEAST_STEPS, min(most, int(TRAINING_SECONDS / seconds_per_step) // 50 * 50))


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe over another number of steps, what happens at a step in proportion."""

    def scaled(step: int) -> int:
        return max(1, step * steps // recipe.trainer.max_steps) if step else 0

    loss, optim, trainer = recipe.loss, recipe.optim, recipe.trainer
    return replace(
        recipe,
        loss=replace(loss, ramp_start=scaled(loss.ramp_start), ramp_steps=scaled(loss.ramp_steps)),
        optim=replace(optim, warmup_steps=scaled(optim.warmup_steps)),
        trainer=replace(
            trainer,
            max_steps=steps,
            val_check_interval=scaled(trainer.val_check_interval),
            checkpoint_every=scaled(trainer.checkpoint_every),
        ),
    )


def _seconds_per_step(recipe: Recipe, console: Console) -> float:
    """Train a few steps as the run will; what the corpus is cut into is kept for it."""
    card, dtype = machine_card(), training_precision(recipe.dtype)
    torch.set_num_threads(num_threads(card, dtype, purpose="training"))
    data = TextData(recipe).prepare(console)
    (joint,) = (one for one in choose_contenders(recipe, dtype)[0] if one.mode == "joint")
    with console.status("measuring this machine"):
        return train_briefly(joint, data, TIMED_STEPS, time.perf_counter)


def _interrupted(out: Path) -> Recipe | None:
    """Return the recipe of a run that waits there to go on, if one does."""
    try:
        return None if (out / "model").exists() else load_saved_recipe(out / RECIPE_FILE)
    except NestlingError:  # no recipe there, or one of another release
        return None


def _report(out: Path) -> Path:
    from train.report.page import write_report

    return write_report([out], out / "report.html")


def _next_steps(out: Path, page: Path) -> str:
    return f"""
look at        {page}
the command    .venv/bin/nestling, or nestling after: source .venv/bin/activate
complete text  nestling generate {out}/model --prompt "def read_config(path):" --temperature 0.8
any member     nestling evaluate {out}/model --data stdlib --granularity ffn=0.5,layers=0-2
cut one out    nestling extract {out}/model --granularity ffn=0.5 --out {out}/half
train longer   nestling train --config configs/demo.yaml trainer.max_steps=5000 --out checkpoints/longer
"""
