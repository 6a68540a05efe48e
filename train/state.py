"""Resumable training states: `steps/<n>/`, whole or absent.

    model.safetensors      weights in training precision
    optimizer.safetensors  AdamW's moments, named like the weights
    state.json             optimizer steps and tokens done
    manifest.json          size and SHA-256 of each file, written last

A run needs nothing else to go on: batches, members' turns and the learning rate are functions of the
step (train/data/loader.py, train/sampler.py, train/optim.py). A damaged state is named and skipped
for the last good one.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from models.elastic import ElasticLM
from models.errors import NestlingError, UsageError
from models.files import read_json, write_folder, write_json
from models.weights import WEIGHTS, write_weights
from train.shards import part_like, whole, whole_model

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TrainingState:
    """A verified state on disk.

    Args:
        path: its folder.
        step: optimizer steps done.
        tokens: tokens trained on.
    """

    path: Path
    step: int
    tokens: int

    def restore_weights(self, model: ElasticLM) -> None:
        """Put the weights into a model of the same shape."""
        saved = load_file(self.path / WEIGHTS)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])

    def restore_optimizer(self, model: ElasticLM, optimizer: Optimizer) -> None:
        """Put the moments back; the learning rate is the schedule's business."""
        saved = load_file(self.path / "optimizer.safetensors")
        for name, parameter in model.named_parameters():
            prefix = f"{name}/"
            optimizer.state[parameter] = {
                # AdamW keeps its step counter on the CPU unless it is fused there
                key.removeprefix(prefix): value if value.dim() == 0 else part_like(value, parameter)
                for key, value in saved.items()
                if key.startswith(prefix)
            }


def save_state(
    steps: Path,
    model: ElasticLM,
    optimizer: Optimizer,
    *,
    step: int,
    tokens: int,
    keep: int,
    writes: bool = True,
) -> Path:
    """Write `steps/<step>/` and drop all but the newest `keep` states.

    A state is whole, however many processes share the weights out: all of them call this, and only the
    one that `writes` has every tensor gathered.

    Raises:
        NestlingError: if the disk refuses; the older states stay.
    """
    path = steps / f"{step:08d}"
    weights = whole_model(model, wanted=writes)
    moments = dict(_moments(model, optimizer, wanted=writes))
    if weights is None:
        return path
    with write_folder(path, marker=MANIFEST) as folder:
        write_weights(folder, weights)
        save_file(moments, folder / "optimizer.safetensors")
        write_json(folder / "state.json", {"step": step, "tokens": tokens})
        write_json(folder / MANIFEST, {file.name: _seal(file) for file in sorted(folder.iterdir())})
    for old in _state_folders(steps)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest_state(steps: Path) -> tuple[TrainingState | None, list[str]]:
    """The newest state that verifies, and a line for each newer one that does not."""
    damaged: list[str] = []
    for folder in _state_folders(steps):
        try:
            return load_state(folder), damaged
        except NestlingError as error:
            damaged.append(str(error))
    return None, damaged


def load_state(folder: Path) -> TrainingState:
    """Verify one state against its manifest.

    Raises:
        UsageError: if there is no such folder.
        NestlingError: naming the file that is missing or damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"--resume {folder}: no such folder; give one of a run's steps/<n>")
    manifest = read_json(folder / MANIFEST)
    for name, seal in manifest.items():
        if not (folder / name).is_file() or _seal(folder / name) != seal:
            raise NestlingError(f"{folder / name} is missing or damaged; an older state will do")
    state = read_json(folder / "state.json")
    return TrainingState(folder, int(state["step"]), int(state["tokens"]))


def sweep(run: Path) -> None:
    """Remove what a killed writer left: hidden `.partial` folders and files."""
    for parent in (run, run / "steps"):
        for orphan in [*parent.glob(".*.partial"), *parent.glob(".*.replaced")]:
            shutil.rmtree(orphan, ignore_errors=True)
            orphan.unlink(missing_ok=True)


def _state_folders(steps: Path) -> list[Path]:
    """State folders, the newest first."""
    folders = [path for path in steps.glob("[0-9]*") if path.is_dir() and path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def _moments(model: ElasticLM, optimizer: Optimizer, *, wanted: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = whole(value)
            if wanted:
                yield f"{name}/{key}", tensor.cpu().contiguous()


def _seal(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{file.stat().st_size} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
