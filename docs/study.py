"""The study behind the defaults: one small family, each time with one thing changed, over corpora and seeds.

    python docs/study.py --data DIR      trains what is missing, then writes docs/results/study/
        [--arm NAME] ... [--corpus NAME] ... [--seed N] ... [--steps N]
                                         of these alone; results of the others stay
        [--time ROUNDS]                  measures how long their steps take instead
    python docs/study.py                 writes the page again from docs/results/study/runs.json
    python docs/study.py --check         exits with 1 if the page says something else

DIR holds `<corpus>_train` and `<corpus>_valid` files. Several processes may be started side by side: each
takes runs that no other has. What is done is kept in --out and not done again, and what was stopped goes
on. The arms are those of docs/study_arms.py, docs/study_time.py measures their time, and docs/study_page.py
writes the page.
"""

import argparse
import fcntl
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from study_arms import (
    ALONE,
    ARMS,
    CORPORA,
    ROOT,
    SEEDS,
    SHORT,
    SHORT_CORPORA,
    Arm,
    Run,
    overrides_of,
    recipe_of,
    work,
)
from study_page import RESULTS, files, read_runs
from study_time import time_arms

from models.base.errors import NestlingError
from models.base.files import make_folder, read_json, write_json
from models.checkpoint.folder import ModelFolder, load_model
from models.elastic.granularity import FULL
from models.elastic.view import View
from models.machine.provenance import make_card
from models.measure.consistency import compare_views, evaluate_shared_alpha
from train.data.module import TextData
from train.report.results import bring_up_to_date, not_current
from train.run.fit import fit
from train.run.speed import training_precision

COMMAND = "python docs/study.py --data data"
EMPTY: Mapping[str, float] = MappingProxyType({})


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing; the folder of the corpora")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "study", help="keeps the runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if out of date")
    parser.add_argument("--arm", action="append", choices=[arm.name for arm in ARMS], help="default: all")
    parser.add_argument("--corpus", action="append", choices=list(CORPORA), help="default: the small ones")
    parser.add_argument("--steps", type=int, default=SHORT, help=f"length of a run; default: {SHORT}")
    parser.add_argument(
        "--time", type=int, metavar="ROUNDS", help="measure the time of a step; train nothing"
    )
    parser.add_argument("--seed", action="append", type=int, help=f"default: {', '.join(map(str, SEEDS))}")
    options = parser.parse_args(arguments)
    if options.data is not None:
        torch.set_num_threads(1)
        names = options.arm or [arm.name for arm in ARMS]
        corpora = options.corpus or SHORT_CORPORA
        try:
            if options.time:
                times = time_arms(names, corpora[0], options.data, options.out, rounds=options.time)
                collect(options.out, times)
            else:
                for arm, run in work(corpora, options.seed or SEEDS, options.steps):
                    if arm.name in names:
                        train_one(arm, run, options.data, options.out)
                collect(options.out)
        except NestlingError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    stale = not_current(files(read_json(RESULTS / "runs.json")))
    return bring_up_to_date(stale, check=options.check, command="python docs/study.py")


def train_one(arm: Arm, run: Run, data: Path, out: Path) -> None:
    """Train and measure one run, unless it is done or another process is at it."""
    folder, result = run.folder(out), run.result(out)
    if result.exists() or (arm.member and not run.of(ALONE).result(out).exists()):
        return
    with mine(folder) as free:
        if not free or result.exists():
            return
        recipe = recipe_of(arm, run, data, out)
        print(f"{time.strftime('%H:%M:%S')} {run}", flush=True)
        fit(recipe, folder, console=Console(quiet=True))
        batches = TextData(recipe).prepare().validation_batches(4 * recipe.trainer.limit_val_batches)
        made = load_model(folder / "model")
        if arm.member:
            own = {arm.member: View(made.model, FULL)}
            members = compare_views(load_model(run.of(ALONE).folder(out) / "model").model, own, batches)
        else:
            members = measure(made, batches)
        found = {**run._asdict(), "members": members, "overrides": overrides_of(arm, run)}
        found["tokens"] = (
            recipe.trainer.max_steps * recipe.trainer.rows_per_step * recipe.data.sequence_length
        )
        write_json(result, found | {"card": make_card(dtypes={"training": training_precision(recipe.dtype)})})


def measure(folder: ModelFolder, batches: Any) -> dict[str, dict[str, float]]:
    """Return each member's loss, match, KL and alpha, its alpha in place, and the bytes that it owns."""
    views = {name: View(folder.model, granularity) for name, granularity in folder.family.items()}
    means = compare_views(folder.model, views, batches)
    shared = evaluate_shared_alpha(folder.model, views, batches)
    return {
        name: {**means[name], "alpha_shared": shared[name], "owned_bytes": view.owned_bytes}
        for name, view in views.items()
    }


@contextmanager
def mine(folder: Path) -> Iterator[bool]:
    """Yield True if no other process is at this run, and hold it until the block ends, or the process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def collect(out: Path, times: Mapping[str, float] = EMPTY) -> None:
    """Put the results of all runs and times into one file, beside those that it has of others."""
    make_folder(RESULTS)
    written = RESULTS / "runs.json"
    kept = read_json(written) if written.exists() else {"card": {}, "runs": []}
    card, runs = kept["card"], read_runs(kept["runs"])
    for path in sorted(out.glob("*/*/*.json")):
        found = read_json(path)
        card = found.pop("card") | {"command": COMMAND}  # whose folders are nobody else's
        runs |= read_runs([found])
    study = {"command": COMMAND, "card": card, "times": kept.get("times", {}) | dict(times)}
    write_json(written, study | {"runs": list(runs.values())})


if __name__ == "__main__":
    sys.exit(main())
