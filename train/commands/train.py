"""`nestling train`: one run, a whole family; see train/run/fit.py.

Dials and recipe keys are given as `a.b=value`, `--a.b=value` or `--a.b value`, in any order and next to the
flags.
"""

import dataclasses
import datetime
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from models.base.errors import UsageError
from train.commands.common import check_recipes
from train.commands.console import make_console
from train.commands.options import ConfigOption, DryRunOption, OutOption, ResumeOption
from train.commands.train_help import HELP_ALL

if TYPE_CHECKING:
    from train.recipe.recipe import Recipe


# Whatever is no flag of ours is a recipe key.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
FLAGS = ("--config", "--out", "--resume", "--dry-run", "--cache", "--cache-only", "--help", HELP_ALL)


def train(
    context: typer.Context,
    *,
    config: ConfigOption = None,
    out: OutOption = None,
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
) -> int:
    """Train a family. Dials and recipe keys follow as KEY=VALUE, --KEY=VALUE or --KEY VALUE."""
    return run_training(context.args, config or [], out, resume=resume, dry_run=dry_run)


def run_training(
    words: Sequence[str],
    files: Sequence[Path],
    out: Path | None,
    *,
    resume: str,
    dry_run: bool,
    cache_only: bool = False,
) -> int:
    """Run `train` or `distill`.

    Args:
        words: Dials and recipe keys.
        files: Recipes.
        out: The run folder, if it was given.
        resume: The state to go on from.
        dry_run: Show what would run, and make nothing.
        cache_only: Make the teacher's cache, and train nothing.

    Returns:
        The exit code.

    Raises:
        UsageError: naming the flag, key or file that cannot be; nothing was made then.
    """
    check_recipes(files)
    check_flags(words)
    from train.recipe.recipe import load_recipe

    recipe = load_recipe(files, words)
    check_sources(recipe)
    console = make_console()
    check_resume(resume)
    from train.data.module import open_chat
    from train.run.devices import check_devices
    from train.run.dryrun import dry_run as show

    check_devices(recipe.trainer)
    open_chat(recipe)  # a template that is missing is said before anything is read
    if dry_run:
        show(recipe, console)
        return 0
    recipe.elastic_config()  # sizes that do not fit are refused before anything is made
    if cache_only:
        from train.run.fit import make_cache

        make_cache(recipe, console)
        return 0
    from train.run.dryrun import too_short
    from train.run.fit import fit

    for line in too_short(recipe):
        console.print(f"[yellow]warning:[/] {line}", highlight=False)
    model = fit(recipe, out or default_out(recipe, files), resume=resume, console=console)
    show_family(model, console)
    return 0


def check_flags(words: Sequence[str]) -> None:
    """Refuse a mistyped flag, naming the right one: to the recipe it would be an unknown key.

    Raises:
        UsageError: naming the flag.

    >>> check_flags(["--seed", "3", "--optim.lr=0.1", "model.qk_norm=true"])
    >>> check_flags(["--dryrun"])
    Traceback (most recent call last):
    models.base.errors.UsageError: --dryrun is not a flag; did you mean --dry-run?
    """
    from train.recipe.dials import DIALS
    from train.recipe.recipe import Recipe

    keys = {*DIALS, *(field.name for field in dataclasses.fields(Recipe))}
    for word in words:
        name = word.partition("=")[0]
        if not name.startswith("--") or "." in name or name.removeprefix("--") in keys:
            continue
        near = difflib.get_close_matches(name, FLAGS, n=1, cutoff=0.7)
        if near:
            raise UsageError(f"{name} is not a flag; did you mean {near[0]}?")


def check_sources(recipe: "Recipe") -> None:
    """Raise UsageError for files that do not exist before anything is made; the hub is not asked yet."""
    from train.data.corpus import looks_like_hub_name, open_corpus

    for key, source in (("data.source", recipe.data.source), ("data.valid", recipe.data.valid)):
        if source is None or source == "stdlib" or source.startswith("hub:"):
            continue
        if Path(source).exists() or not looks_like_hub_name(source):
            open_corpus(source, key=key)


def check_resume(resume: str) -> None:
    """Raise UsageError unless it is a word that `--resume` knows, or a folder."""
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UsageError(f"--resume {resume} is no folder; give auto, never or a run's steps/<n>")


def default_out(recipe: "Recipe", configs: Sequence[Path]) -> Path:
    """Return `checkpoints/<name>`: the tracking name, that of the last file, or else the time."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("checkpoints") / (recipe.tracking.name or (configs[-1].stem if configs else now))


def show_family(path: Path, console: Console) -> None:
    """Print what was measured on each member, and what to do with the model."""
    from models.checkpoint.folder import load_model
    from train.report.tables import FAMILY_LEGEND, family_table

    console.print(family_table(load_model(path).members).to_rich(caption=FAMILY_LEGEND))
    console.print(f"{path}\nnext: nestling generate {path} --prompt TEXT", markup=False)
