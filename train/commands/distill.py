"""`nestling distill`: the training of `nestling train` with a teacher; see train/distill/open.py.

A recipe with members gives a family that learned from the teacher; one with `family={}` a single student,
such as a separate draft for its teacher.
"""

from pathlib import Path
from typing import Annotated

import typer

from models.base.errors import UsageError
from models.base.paths import is_url
from train.commands.options import ConfigOption, DryRunOption, OutOption, ResumeOption
from train.commands.train import run_training


def distill(
    context: typer.Context,
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="TEACHER",
            help="A model folder or GGUF file, whose tokenizer the new model shares, or the URL of a server.",
        ),
    ],
    *,
    config: ConfigOption = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that keeps what the teacher says about the text: made once, used by many runs.",
        ),
    ] = None,
    cache_only: Annotated[
        bool, typer.Option("--cache-only", help="Make the cache, and train nothing.")
    ] = False,
    out: OutOption = None,
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
) -> int:
    """Train a family, or one model, that learns from a trained one: train with loss.teacher=TEACHER.

    Dials and recipe keys follow as KEY=VALUE, --KEY=VALUE or --KEY VALUE.
    """
    if not is_url(teacher) and not Path(teacher).expanduser().exists():
        raise UsageError(
            f"TEACHER {teacher} does not exist; give a model folder, a GGUF file or a URL first, then "
            "recipe keys"
        )
    words = [*context.args, f"loss.teacher={teacher}"]
    if cache is not None:
        words.append(f"distill.cache={cache}")
    return run_training(words, config or [], out, resume=resume, dry_run=dry_run, cache_only=cache_only)
