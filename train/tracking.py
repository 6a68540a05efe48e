"""Loggers that mirror `metrics.jsonl`: wandb, TensorBoard, or any other of Lightning's by name."""

import importlib.util
import os
import secrets
import warnings
from pathlib import Path

from lightning.pytorch.loggers import Logger

from models.errors import UsageError
from models.files import write_text
from train.recipe import TrackingConfig


def make_loggers(config: TrackingConfig, run: Path) -> list[Logger]:
    """The loggers that a recipe names. wandb works offline without a key and keeps its run id.

    Raises:
        UsageError: if a logger's package is not installed or Lightning knows none of that name.
    """
    loggers: list[Logger] = []
    mode = config.wandb
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode != "disabled":
        try:
            loggers.append(_wandb(config, run, offline=mode == "offline"))
        except Exception as error:  # noqa: BLE001 - the mirror may fail in any way, the run goes on
            warnings.warn(f"wandb failed and is dropped: {error}", stacklevel=2)
    if config.tensorboard and importlib.util.find_spec("tensorboard"):
        loggers.append(_named("lightning.pytorch.loggers.TensorBoardLogger", run))
    if config.logger:
        loggers.append(_named(config.logger, run))
    return loggers


def _wandb(config: TrackingConfig, run: Path, *, offline: bool) -> Logger:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    identity = run / "wandb_id"
    if not identity.is_file():
        write_text(identity, secrets.token_hex(4))
    return WandbLogger(
        project=config.project,
        name=config.name or run.name,
        id=identity.read_text(encoding="utf-8"),
        save_dir=run,
        offline=offline,
        resume=None if offline else "allow",
        settings=wandb.Settings(silent=True),
    )


def _named(path: str, run: Path) -> Logger:
    """A logger by import path, or by the name of one of Lightning's."""
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
