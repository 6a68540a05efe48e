"""The study behind the defaults: one small family, each time with one thing changed, over corpora and seeds.

    python docs/study.py --data DIR      trains what is missing, then writes docs/results/study/
        [--arm NAME] ... [--seed N] ...  of these alone; results of the others stay
    python docs/study.py                 writes the page again from docs/results/study/runs.json
    python docs/study.py --check         exits with 1 if the page says something else

DIR holds `<corpus>_train` and `<corpus>_valid` files. Several processes may be started side by side: each
takes runs that no other has. What is done is kept in --out and not done again.
"""

import argparse
import dataclasses
import fcntl
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
import torch
from rich.console import Console

from models.base.errors import NestlingError
from models.base.files import make_folder, read_json, write_json
from models.base.numbers import NOTHING
from models.base.table import Table
from models.checkpoint.folder import ModelFolder, load_model
from models.elastic.granularity import FULL
from models.elastic.view import View
from models.machine.provenance import make_card
from models.measure.consistency import compare_views, evaluate_shared_alpha
from train.data.module import TextData
from train.recipe.recipe import FULL_NAME, Recipe, load_recipe
from train.report.results import bring_up_to_date, not_current
from train.report.style import INK, Chart, styled, to_svg
from train.report.tables import flatten
from train.run.fit import fit, training_precision

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "study.yaml"
RESULTS = ROOT / "docs" / "results" / "study"
CORPORA = {"tinystories": "txt.xz", "dialogues": "jsonl.xz"}
SEEDS = range(3)

MEASURES = {"alpha_shared": "in place"}
ALONE = "full model alone"
NO_FAMILY = ("family.S=null", "family.L=null", "family.D=null")
SMALL = {"S": "model.intermediate_size=64", "D": "model.num_hidden_layers=1"}
"""A member's shape as a model of its own."""


Runs: TypeAlias = Mapping[tuple[str, str, int], Mapping[str, Mapping[str, float]]]
"""(arm, corpus, seed) -> member -> measure."""

NOTE = "<!-- generated from runs.json by `python docs/study.py`; do not edit -->"
COMMAND = "python docs/study.py --data data"
INTRODUCTION = """\
`configs/study.yaml` (1.1M parameters, 922,000 tokens), each time with one thing changed against `base`,
which is the defaults but for its `exit_stride` of 2 and losses that do not fade: the defaults are the row
`exit_stride 4, fade_to 0.1`. Means over the seeds; "against alone" is the mean and the standard error of the
paired differences in the full model's loss, in percent. Loss in nats per token of held-out text; alpha:
expected acceptance of a drafted token, by the member's own keys and values or, "in place", by the full
model's, as it decodes. `S alone` and `D alone` are models of that shape trained on the same tokens by
themselves, the distilled ones with the full model alone as a frozen teacher, by the loss that members learn
from; their alpha is against the full model alone.
So small a model, so early in its training, shows directions, not the size of an effect in yours."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: what differs, as the page says it.
        overrides: of the recipe.
        member: which member's shape this is, if it is a small model of its own.
        taught: whether it learns from the full model that was trained alone, as members do from theirs.
    """

    name: str
    overrides: tuple[str, ...] = ()
    member: str | None = None
    taught: bool = False


ARMS = (
    Arm("base"),
    Arm(ALONE, NO_FAMILY),
    Arm("S alone", (*NO_FAMILY, SMALL["S"]), member="S"),
    Arm("D alone", (*NO_FAMILY, SMALL["D"]), member="D"),
    Arm("S distilled", (*NO_FAMILY, SMALL["S"]), member="S", taught=True),
    Arm("D distilled", (*NO_FAMILY, SMALL["D"]), member="D", taught=True),
    Arm("weight_power 0.5", ("sampler.weight_power=0.5",)),
    Arm("exit_stride 1", ("sampler.exit_stride=1",)),
    Arm("row_fraction 1/4", ("sampler.row_fraction=0.25",)),
    Arm("cross_entropy", ("loss.divergence=cross_entropy",)),
    Arm("forward_kl", ("loss.divergence=forward_kl",)),
    Arm("kl_tv", ("loss.divergence=kl_tv",)),
    Arm("no ramp", ("loss.ramp_start=0", "loss.ramp_steps=0")),
    Arm("shared_cache 0", ("sampler.shared_cache=0",)),
    Arm("min_rows 1", ("sampler.min_rows=1",)),
    Arm("all members on all rows", ("sampler.kind=all",)),
    Arm("exit_stride 4", ("sampler.exit_stride=4",)),
    Arm("shared_cache 1", ("sampler.shared_cache=1",)),
    Arm("exit_stride 4, fade_to 0.25", ("sampler.exit_stride=4", "loss.fade_to=0.25")),
    Arm("exit_stride 4, fade_to 0.1", ("sampler.exit_stride=4", "loss.fade_to=0.1")),
)
FIRST = 14
"""The number of arms that get all their seeds before the others get their first."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing; the folder of the corpora")
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "study", help="keeps the runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if out of date")
    parser.add_argument("--arm", action="append", choices=[arm.name for arm in ARMS], help="default: all")
    parser.add_argument("--seed", action="append", type=int, help=f"default: {', '.join(map(str, SEEDS))}")
    options = parser.parse_args(arguments)
    if options.data is not None:
        torch.set_num_threads(1)
        seeds = options.seed or SEEDS
        try:
            for arm, corpus, seed in work(seeds):
                if options.arm is None or arm.name in options.arm:
                    train_one(arm, corpus, seed, options.data, options.out)
        except NestlingError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        collect(options.out, seeds)
    stale = not_current(files(read_json(RESULTS / "runs.json")))
    return bring_up_to_date(stale, check=options.check, command="python docs/study.py")


def work(seeds: Iterable[int]) -> Iterator[tuple[Arm, str, int]]:
    """Every run, in the order that makes an early end worth most."""
    for arms in (ARMS[:FIRST], ARMS[FIRST:]):
        for seed in seeds:
            for corpus in CORPORA:
                for arm in arms:
                    yield arm, corpus, seed


def folder_of(arm: str, corpus: str, seed: int, out: Path) -> Path:
    """Return the folder of a run."""
    return out / corpus / str(seed) / arm.replace(" ", "-").replace("/", "_").replace(".", "_")


def result_of(folder: Path) -> Path:
    """The file that tells what a run reached."""
    return folder.with_name(f"{folder.name}.json")


def recipe_of(arm: Arm, corpus: str, seed: int, data: Path, out: Path) -> Recipe:
    """The recipe of a run."""
    ending = CORPORA[corpus]
    files = [f"data.source={data}/{corpus}_train.{ending}", f"data.valid={data}/{corpus}_valid.{ending}"]
    if arm.taught:
        files.append(f"loss.teacher={folder_of(ALONE, corpus, seed, out) / 'model'}")
    return load_recipe([CONFIG], [*files, f"seed={seed}", *arm.overrides])


def train_one(arm: Arm, corpus: str, seed: int, data: Path, out: Path) -> None:
    """Train and measure one run, unless it is done or another process is at it."""
    folder, full = (folder_of(name, corpus, seed, out) for name in (arm.name, ALONE))
    result = result_of(folder)
    if result.exists() or (arm.member and not result_of(full).exists()):
        return
    with mine(folder) as free:
        if not free or result.exists():
            return
        recipe = recipe_of(arm, corpus, seed, data, out)
        print(f"{time.strftime('%H:%M:%S')} {corpus} {seed} {arm.name}", flush=True)
        start = time.process_time()
        fit(recipe, folder, console=Console(quiet=True))
        seconds = time.process_time() - start
        batches = TextData(recipe).prepare().validation_batches(4 * recipe.trainer.limit_val_batches)
        made = load_model(folder / "model")
        if arm.member:
            own = {arm.member: View(made.model, FULL)}
            members = compare_views(load_model(full / "model").model, own, batches)
        else:
            members = measure(made, batches)
        found = {"arm": arm.name, "corpus": corpus, "seed": seed, "members": members, "cpu_seconds": seconds}
        found |= {
            "overrides": list(arm.overrides),
            "tokens": recipe.trainer.max_steps * recipe.trainer.rows_per_step * recipe.data.sequence_length,
        }
        write_json(result, found | {"card": make_card(dtypes={"training": training_precision(recipe.dtype)})})


def measure(folder: ModelFolder, batches: Any) -> dict[str, dict[str, float]]:
    """Every member's loss, match, KL and alpha, and its alpha as a draft that reads the target's cache."""
    views = {name: View(folder.model, granularity) for name, granularity in folder.family.items()}
    means = compare_views(folder.model, views, batches)
    shared = evaluate_shared_alpha(folder.model, views, batches)
    return {name: {**means[name], "alpha_shared": shared[name]} for name in views}


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


def collect(out: Path, seeds: Iterable[int]) -> None:
    """Put the results of all runs into one file, beside those that it has of others."""
    make_folder(RESULTS)
    written = RESULTS / "runs.json"
    kept = read_json(written) if written.exists() else {"card": {}, "runs": []}
    card, runs = kept["card"], {(run["arm"], run["corpus"], run["seed"]): run for run in kept["runs"]}
    for arm, corpus, seed in work(seeds):
        path = result_of(folder_of(arm.name, corpus, seed, out))
        if path.exists():
            run = read_json(path)
            card = run.pop("card") | {"command": COMMAND}  # whose folders are nobody else's
            runs[arm.name, corpus, seed] = run
    write_json(written, {"command": COMMAND, "card": card, "runs": list(runs.values())})


def files(study: Mapping[str, Any]) -> dict[Path, str]:
    """The page and its picture."""
    runs = {(run["arm"], run["corpus"], run["seed"]): run["members"] for run in study["runs"]}
    seen = [corpus for corpus in CORPORA if any(key[1] == corpus for key in runs)]
    parts = [NOTE, "# What the defaults rest on", INTRODUCTION]
    for corpus in seen:
        parts += [
            f"## {corpus}",
            f"![full model's loss and alpha]({corpus}.svg)",
            table(runs, corpus).to_markdown(),
        ]
    card = Table(("card", ""), tuple(flatten(study["card"]).items()), num_labels=2)
    parts += [f"Trained and measured by\n\n```\n{study['command']}\n```", card.to_markdown()]
    page = {RESULTS / "README.md": "\n\n".join(parts) + "\n"}
    return page | {RESULTS / f"{corpus}.svg": to_svg(picture(runs, corpus)) for corpus in seen}


def table(runs: Runs, corpus: str) -> Table:
    """A row for each arm: means over the seeds, and the spread of the full model's loss."""
    columns = [("S", "loss"), ("S", "alpha"), ("S", "alpha_shared"), ("L", "loss"), ("L", "alpha")]
    columns += [("D", "loss"), ("D", "alpha"), ("D", "match")]
    header = ["trained with", "seeds", "full model's loss", "against alone"]
    header += [f"{member} {MEASURES.get(measure, measure)}" for member, measure in columns]
    rows = []
    for arm in ARMS:
        found = {seed: run for (*what, seed), run in runs.items() if what == [arm.name, corpus]}
        if found:
            worse = [full_loss(runs, arm.name, corpus, seed) for seed in found if FULL_NAME in found[seed]]
            cells = [mean(found.values(), FULL_NAME, "loss"), spread(worse)]
            cells += [mean(found.values(), member, measure) for member, measure in columns]
            rows.append((arm.name, str(len(found)), *cells))
    return Table(tuple(header), tuple(rows))


def full_loss(runs: Runs, arm: str, corpus: str, seed: int) -> float:
    """Return how many percent the full model's loss is above that of the full model alone."""
    own, alone = (runs[name, corpus, seed][FULL_NAME]["loss"] for name in (arm, ALONE))
    return 100 * (own / alone - 1)


def mean(runs: Iterable[Mapping[str, Any]], member: str, measure: str) -> str:
    """Return the mean of a member's measure over the seeds."""
    values = [run[member][measure] for run in runs if measure in run.get(member, {})]
    return f"{statistics.fmean(values):.3f}" if values else NOTHING


def spread(percents: Sequence[float]) -> str:
    """Mean and standard error of the differences between paired runs, in percent.

    >>> spread([1.0, 2.0, 3.0])
    '+2.0 ± 0.6 %'
    """
    if not percents:
        return NOTHING
    error = f" ± {statistics.stdev(percents) / len(percents) ** 0.5:.1f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):+.1f}{error} %"


def picture(runs: Runs, corpus: str) -> Chart:
    """Each arm as a point: what it costs the full model, and how well its members draft."""
    rows = [
        {
            "arm": arm,
            "loss": full_loss(runs, arm, corpus, seed),
            **{name: members[name]["alpha"] for name in "DL"},
        }
        for (arm, text, seed), members in runs.items()
        if text == corpus and {"D", "L", FULL_NAME} <= set(members)
    ]
    scale = alt.Scale(zero=False, padding=30)
    panels = []
    for name in "DL":
        base = alt.Chart(alt.InlineData(values=rows)).encode(
            x=alt.X("mean(loss):Q", title="full model's loss against alone, %", scale=scale),
            y=alt.Y(f"mean({name}):Q", title=f"alpha of {name}", scale=scale),
            detail="arm:N",
        )
        points = base.mark_point(filled=True, size=60, color=INK)
        labels = base.mark_text(align="left", dx=7, fontSize=11, color=INK).encode(text="arm:N")
        panels.append(alt.LayerChart(layer=[points, labels]).properties(width=430, height=330))
    return styled(alt.hconcat(*panels, spacing=36)).properties(background="white", padding=16)


if __name__ == "__main__":
    sys.exit(main())
