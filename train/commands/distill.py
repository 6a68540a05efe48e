"""`nestling distill`: the training of `nestling train` with a teacher; see train/distill/open.py.

A recipe with members gives a family that learned from the teacher; one with `family={}` a single student,
such as a separate draft for its teacher.
"""

from pathlib import Path
from typing import Annotated

import typer

from models.base.errors import UsageError
from train.commands.common import ConfigOption
from train.commands.train import DryRunOption, OutOption, ResumeOption, run_training


def distill(
    context: typer.Context,
    teacher: Annotated[
        Path,
        typer.Argument(
            metavar="TEACHER", help="A model folder or GGUF file; the new model shares its tokenizer."
        ),
    ],
    *,
    config: ConfigOption = None,
    out: OutOption = None,
    resume: ResumeOption = "auto",
    dry_run: DryRunOption = False,
) -> int:
    """Train a family, or one model, that learns from a trained one: train with loss.teacher=TEACHER.

    Dials and recipe keys follow as KEY=VALUE, --KEY=VALUE or --KEY VALUE.
    """
    if not teacher.exists():
        raise UsageError(
            f"TEACHER {teacher} does not exist; give a model folder or a GGUF file first, then recipe keys"
        )
    words = [*context.args, f"loss.teacher={teacher}"]
    return run_training(words, config or [], out, resume=resume, dry_run=dry_run)
