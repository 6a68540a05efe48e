"""A run's folder: whether it fits the recipe, which of its states the run goes on from, what a kill left.

recipe.yaml  metrics.jsonl  steps/<n>/  model/  and with a teacher teacher.json
"""

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from models.base.errors import NestlingError, UsageError
from models.base.files import check_replaceable, make_folder, read_json, remove_folder, sweep, write_json
from train.data.module import TextData
from train.recipe.recipe import Recipe, load_saved_recipe, save_recipe
from train.run.module import JointModule
from train.run.state import TrainingState, drop_old_states, load_state, newest_state
from train.run.teacher import Teacher

RECIPE_FILE = "recipe.yaml"
TEACHER_FILE = "teacher.json"
FREE_TO_CHANGE = ("trainer", "tracking")
"""Sections of a recipe that a resumed run may change."""


def find_state(
    recipe: Recipe, out: Path, resume: str, console: Console, teacher: Teacher | None = None
) -> TrainingState | None:
    """Return the state to go on from, if any; touch nothing."""
    check_replaceable(out, marker=RECIPE_FILE)
    if resume == "never":
        return None
    if (out / RECIPE_FILE).is_file():
        _check_same(recipe, load_saved_recipe(out / RECIPE_FILE), out)
        _check_same_teacher(teacher, out)
    if resume != "auto":
        return load_state(Path(resume))
    state, damaged = newest_state(out / "steps")
    for line in damaged:
        warn(console, line)
    if state is None and damaged:
        warn(console, f"no state in {out / 'steps'} is whole; starting at step 0")
    if state is not None:
        console.print(f"resuming at step {state.step} of {recipe.trainer.max_steps}", highlight=False)
    return state


def open_run(
    recipe: Recipe, out: Path, state: TrainingState | None, teacher: Teacher | None, *, restart: bool
) -> None:
    """Make the run folder, once everything that can be refused was, and clear away what a kill left.

    Args:
        recipe: saved in it.
        out: the folder.
        state: what the run goes on from.
        teacher: recorded in it.
        restart: clear an earlier run.
    """
    if restart:
        for part in (out / "steps", out / "model"):
            remove_folder(part)
        for file in (RECIPE_FILE, TEACHER_FILE, "metrics.jsonl", "wandb_id"):
            (out / file).unlink(missing_ok=True)
    make_folder(out)
    for folder in (out, out / "steps"):
        sweep(folder)
    if state is not None:
        drop_old_states(out / "steps", step=state.step, keep=recipe.trainer.keep_checkpoints)
    save_recipe(recipe, out / RECIPE_FILE)  # first: it makes the folder one that may be gone on with
    if teacher is not None:
        write_json(out / TEACHER_FILE, teacher.record)


def _check_same(recipe: Recipe, before: Recipe, out: Path) -> None:
    ours, theirs = asdict(recipe), asdict(before)
    changed = [name for name in ours if name not in FREE_TO_CHANGE and ours[name] != theirs[name]]
    if changed:
        raise UsageError(
            f"--out {out} holds a run with another {' and '.join(changed)} section; "
            "choose another --out, or start over with --resume never"
        )


def _check_same_teacher(teacher: Teacher | None, out: Path) -> None:
    """Compare the weights; a run without a record was killed before it trained."""
    record = out / TEACHER_FILE
    if teacher is None or not record.is_file() or read_json(record).get("sha256") == teacher.sha256:
        return
    raise UsageError(
        f"loss.teacher={teacher.path}: has other weights than when the run in --out {out} began; "
        "restore them, choose another --out, or start over with --resume never"
    )


def earlier_state(
    module: JointModule, data: TextData, steps: Path, returns: list[int], console: Console
) -> TrainingState:
    """Return the state from which a run that diverged goes on: the newest, with data not read yet.

    If the run already diverged from that one, or from one before it, an older one is taken: so each return
    either gets further than all before it or begins earlier, and their number is finite. A run that is
    killed in between repeats them, for all of it is a function of the states on disk.

    Args:
        module: The module as it ended.
        data: The data as the module read them.
        steps: The folder of states.
        returns: The steps that the run returned to before; the new one is added.
        console: Shows a line about it.

    Raises:
        NestlingError: if there is no older state.
    """
    state, _ = newest_state(steps)
    if state is not None and state.step <= max(returns, default=-1):
        state, _ = newest_state(steps, before=returns[-1])
    if state is None:
        raise NestlingError(
            f"training goes astray before step {module.step} from every state in {steps}: the gradient's "
            "norm is not finite or leaps; choose a smaller optim.lr, or another optim.skip_sigma, "
            "and start over with --resume never"
        )
    returns.append(state.step)
    warn(console, f"three steps in a row were skipped before step {module.step}; back to step {state.step}")
    offset = data.offset + module.step - state.step
    return replace(state, data_offset=offset, guard=module.guard.after_rollback())


def warn(console: Console, line: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning:[/] {line}", highlight=False)
