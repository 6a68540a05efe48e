"""Loggers that mirror `metrics.jsonl`: wandb, TensorBoard, or any other of Lightning's by name."""

import importlib.util
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from models.base.errors import UsageError
from models.base.files import write_text
from train.recipe.sections import TrackingConfig

BEST = {
    "loss/{}": "min",
    "valid/{}/loss": "min",
    "valid/{}/kl": "min",
    "valid/{}/match": "max",
    "valid/{}/alpha": "max",
    "valid/{}/speedup": "max",
}
"""The best value of these metrics goes into wandb's summary; of all others the last one does."""


def make_loggers(
    config: TrackingConfig,
    run: Path,
    members: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> list[Logger]:
    """Make the loggers that a recipe names; wandb works offline without a key and keeps its run id.

    Args:
        config: the recipe's `tracking` section.
        run: the run folder.
        members: names of the family, which has panels in the dashboard.
        settings: the recipe, by which the dashboard can group and filter runs.

    Raises:
        UsageError: if a logger's package is not installed or Lightning knows none of that name.
    """
    loggers: list[Logger] = []
    mode: str = config.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    if mode != "disabled":
        try:
            loggers.append(_wandb(config, run, members, settings, offline=mode in ("offline", "dryrun")))
        except Exception as error:  # noqa: BLE001 - the mirror may fail in any way, the run goes on
            warnings.warn(f"wandb failed and is dropped: {error}", stacklevel=2)
    if config.tensorboard and importlib.util.find_spec("tensorboard"):
        loggers.append(_named("lightning.pytorch.loggers.TensorBoardLogger", run))
    if config.logger:
        loggers.append(_named(config.logger, run))
    return loggers


class Dashboard(WandbLogger):
    """wandb, with a section of panels for each member, over the tokens trained on.

    Args:
        run: the run, from `wandb.init`.
        members: names of the family.
    """

    def __init__(self, run: Any, members: Iterable[str]) -> None:
        super().__init__(experiment=run)
        for axis in ("tokens", "step"):
            run.define_metric(axis, hidden=True)
        run.define_metric("*", step_metric="tokens")
        for member in members:
            for pattern, best in BEST.items():
                run.define_metric(panel(pattern.format(member)), step_metric="tokens", summary=best)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log the numbers of one line, or a table, by the names of their panels."""
        self.experiment.log({"step": step, **{panel(key): value for key, value in metrics.items()}})


def panel(key: str) -> str:
    """Return wandb's name of a metric: a section is what stands before the slash, here the member.

    See https://docs.wandb.ai/support/models/articles/how-can-i-organize-my-logged-charts-and-

    >>> panel("loss/S"), panel("valid/S/alpha"), panel("lr")
    ('S/loss', 'S/valid_alpha', 'lr')
    """
    kind, *rest = key.split("/")
    return "/".join([rest[0], "_".join([kind, *rest[1:]])]) if rest else kind


def _wandb(
    config: TrackingConfig,
    run: Path,
    members: Iterable[str],
    settings: Mapping[str, Any] | None,
    *,
    offline: bool,
) -> Logger:
    import wandb

    identity = run / "wandb_id"
    if not identity.is_file():
        write_text(identity, secrets.token_hex(4))
    made = wandb.init(  # not by Lightning, whose arguments make wandb warn
        project=config.project,
        name=config.name or run.name,
        id=identity.read_text(encoding="utf-8"),
        dir=run,
        config=dict(settings or {}),
        mode="offline" if offline else "online",
        resume=None if offline else "allow",
        reinit="finish_previous",  # this run's own part before a return to an earlier state
        settings=wandb.Settings(silent=True),
    )
    return Dashboard(made, members)


def _named(path: str, run: Path) -> Logger:
    """Return a logger by import path, or by the name of one of Lightning's."""
    module, _, name = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module or "lightning.pytorch.loggers"), name)(save_dir=run)
    except (ImportError, AttributeError, TypeError) as error:
        raise UsageError(
            f"tracking.logger={path}: cannot be made ({error}); give a logger class of Lightning's, "
            "such as CSVLogger, or the import path of one, and install what it needs"
        ) from None
    assert isinstance(made, Logger)
    return made
