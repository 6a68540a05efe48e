"""A run's folder: whether it fits the recipe, which of its states the run goes on from, what a kill left.

recipe.yaml  data.json  metrics.jsonl  steps/<n>/  model/  and with a teacher teacher.json
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from models.base.errors import NestlingError, UsageError
from models.base.files import check_replaceable, make_folder, read_json, remove_folder, sweep, write_json
from models.base.outputs import check_apart
from train.data.module import TextData
from train.objective.teacher import Teacher
from train.recipe.recipe import Recipe, load_saved_recipe, save_recipe
from train.recipe.settings import as_table
from train.run.identity import (
    DATA_FILE,
    RECIPE_FILE,
    Identity,
    check_recipe,
    check_same_run,
    read_identity,
    what_changes,
)
from train.run.lock import RunLock
from train.run.module import JointModule
from train.run.state import TrainingState, drop_old_states, load_state, newest_state

TEACHER_FILE = "teacher.json"


def find_state(
    recipe: Recipe, out: Path, resume: str, console: Console, teacher: Teacher | None = None
) -> TrainingState | None:
    """Return the state to go on from, if any; touch nothing."""
    check_replaceable(out, marker=RECIPE_FILE)
    reads = {"loss.teacher": recipe.loss.teacher, "model.from": recipe.model.from_}
    cache = {} if recipe.distill.cache is None else {"distill.cache": Path(recipe.distill.cache)}
    check_apart({"--out": out, **cache}, reads)
    if resume == "never":
        return None
    if (out / RECIPE_FILE).is_file():
        check_recipe(as_table(recipe), as_table(load_saved_recipe(out / RECIPE_FILE)), f"--out {out}")
        _check_same_teacher(teacher, out, "loss.teacher" if recipe.loss.teacher else "model.from")
    if resume != "auto":
        named = load_state(Path(resume))
        if before := _told_by(named).recipe:
            check_recipe(as_table(recipe), before, f"--resume {resume}")
        return named
    state, damaged = newest_state(out / "steps")
    for line in damaged:
        warn(console, line)
    if state is None and damaged:
        warn(console, f"no state in {out / 'steps'} is whole; starting at step 0")
    if state is not None:
        console.print(f"resuming at step {state.step} of {recipe.trainer.max_steps}", highlight=False)
    return state


def check_belongs(
    recipe: Recipe, ours: Identity, out: Path, state: TrainingState | None, console: Console
) -> None:
    """Compare the run with its folder and its state once its data are known, and tell what may change.

    Raises:
        UsageError: naming what differs, with both values; nothing was written.
    """
    there = read_identity(out)
    if there is not None:
        check_same_run(ours, there, f"--out {out}")
    if state is not None:
        theirs = _told_by(state)
        check_same_run(ours, theirs, f"--resume {state.path}")
        for line in what_changes(recipe, ours, theirs, step=state.step, row=state.first_row(recipe)):
            console.print(line, highlight=False, markup=False)


def _told_by(state: TrainingState) -> Identity:
    """Return the run that a state tells of; an old one tells nothing, but the folder around it may."""
    if state.run:
        return Identity.read(state.run)
    return read_identity(state.path.absolute().parent.parent) or Identity(recipe={})


def open_run(
    recipe: Recipe,
    out: Path,
    state: TrainingState | None,
    teacher: Teacher | None,
    *,
    run: Identity,
    restart: bool,
    lock: RunLock,
) -> None:
    """Make the run folder, once everything that can be refused was, and clear away what a kill left.

    Args:
        recipe: saved in it.
        out: the folder.
        state: the state that the run goes on from.
        teacher: recorded in it.
        run: recorded in it.
        restart: clear an earlier run.
        lock: taken, if the folder was not there before.
    """
    make_folder(out)
    lock.take()
    if restart:
        for part in (out / "steps", out / "model"):
            remove_folder(part)
        for file in (RECIPE_FILE, DATA_FILE, TEACHER_FILE, "metrics.jsonl", "wandb_id"):
            (out / file).unlink(missing_ok=True)
    for folder in (out, out / "steps"):
        sweep(folder)
    if state is not None:
        drop_old_states(out / "steps", step=state.step, keep=recipe.trainer.keep_checkpoints)
    save_recipe(recipe, out / RECIPE_FILE)  # first: it makes the folder one that may be gone on with
    write_json(out / DATA_FILE, run.data)
    if teacher is not None:
        write_json(out / TEACHER_FILE, dict(teacher.record))


def _check_same_teacher(teacher: Teacher | None, out: Path, key: str) -> None:
    """Compare the weights; a run without a record was killed before it trained."""
    record = out / TEACHER_FILE
    if teacher is None or not record.is_file() or read_json(record).get("sha256") == teacher.record["sha256"]:
        return
    raise UsageError(
        f"{key}={teacher.record['path']}: has other weights than when the run in --out {out} began; "
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
    return replace(state, rows=data.row_at(module.step), guard=module.guard.after_rollback())


def warn(console: Console, line: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]warning:[/] {line}", highlight=False)
