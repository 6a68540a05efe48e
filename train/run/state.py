"""Resumable training states: `steps/<n>/`, complete or absent.

    model.safetensors      weights in training precision
    owned.safetensors      what members have for themselves, if anything
    optimizer.safetensors  AdamW's moments, named like the weights
    replay.safetensors     rows that were written for later steps, if any (train/distill/written.py)
    state.json             optimizer steps, tokens and rows done, the guard's counters, the run that it is of
    manifest.json          size and SHA-256 of each file, written last

A run needs nothing else to go on: batches, members' slots and the learning rate are functions of the
step (train/data/loader.py, train/objective/sampler.py, train/run/optim.py), and what train/run/skip_steps.py
counts is in `state.json`. A damaged state is named and skipped for the last good one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from models.base.errors import NestlingError, UsageError
from models.base.files import hash_files, read_json, remove_folder, write_folder, write_json
from models.base.paths import utf8_path
from models.checkpoint.tensor_file import write_tensor_file
from models.checkpoint.weights import OWNED_WEIGHTS, WEIGHTS, weights_of
from models.elastic.model import ElasticLM
from models.elastic.owning import owned_weights
from train.recipe.recipe import Recipe
from train.recipe.settings import as_table
from train.run.fsdp import gather, gather_model, shard_like
from train.run.identity import check_shapes

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
REPLAY = "replay.safetensors"
STATE = "state.json"
ROWS_OF_A_STEP = ("batch_size", "accumulate_grad_batches")


@dataclass(frozen=True)
class TrainingState:
    """A verified state on disk.

    Args:
        path: its folder.
        step: optimizer steps done.
        tokens: tokens trained on.
        rows: rows of the shuffled data that were read or passed over; None in an old state.
        data_offset: of an old state: step s reads the batch of step s + data_offset.
        guard: counters of `train/run/skip_steps.py`.
        run: the run that it is of; empty in an old state.
    """

    path: Path
    step: int
    tokens: int
    rows: int | None = None
    data_offset: int = 0
    guard: Mapping[str, float] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def first_row(self, recipe: Recipe) -> int:
        """Return the index of the next row that a run reads from here."""
        if self.rows is not None:
            return self.rows
        return (self.step + self.data_offset) * recipe.trainer.rows_per_step

    def replay(self, recipe: Recipe) -> dict[str, Tensor]:
        """Return the rows that were written for later steps, by step; none if steps have another size."""
        before, now = self.run.get("recipe", {}).get("trainer", {}), as_table(recipe.trainer)
        changed = any(before.get(key, now[key]) != now[key] for key in ROWS_OF_A_STEP)
        if changed or not (self.path / REPLAY).is_file():
            return {}
        with utf8_path(self.path) as path:
            return load_file(path / REPLAY)

    def restore_weights(self, model: ElasticLM) -> None:
        """Put the weights into a model of the same shape."""
        self._restore(weights_of(model), WEIGHTS)
        if model.members:
            self._restore(dict(owned_weights(model)), OWNED_WEIGHTS)

    def _restore(self, weights: Mapping[str, Tensor], file: str) -> None:
        with utf8_path(self.path) as path:
            saved = load_file(path / file) if (path / file).is_file() else {}
        check_shapes(
            {name: parameter.shape for name, parameter in weights.items()},
            {name: tensor.shape for name, tensor in saved.items()},
            self.path / file,
        )
        for name, parameter in weights.items():
            parameter.copy_(saved[name])

    def restore_optimizer(self, model: ElasticLM, optimizer: Optimizer) -> None:
        """Put the moments back; the learning rate is the schedule's business."""
        with utf8_path(self.path) as path:
            saved = load_file(path / OPTIMIZER)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            prefix = f"{name}/"
            optimizer.state[parameter] = {
                # AdamW keeps its step counter on the CPU unless it is fused there
                key.removeprefix(prefix): value if value.dim() == 0 else shard_like(value, parameter)
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
    rows: int = 0,
    guard: Mapping[str, float] | None = None,
    run: Mapping[str, Any] | None = None,
    replay: Mapping[str, Tensor] | None = None,
    writes: bool = True,
) -> Path:
    """Write `steps/<step>/`, then drop all but the newest `keep` states up to it.

    States of later steps go too: they are damaged, or of a history that this one replaces.

    A state has the full weights, however many processes the model is sharded over: all of them call this,
    and every tensor is gathered in the one that `writes`.

    Raises:
        NestlingError: if the disk refuses; the older states stay.
    """
    path = steps / f"{step:08d}"
    weights = gather_model(model, wanted=writes)
    moments = dict(_moments(model, optimizer, wanted=writes))
    if weights is None:
        return path
    with write_folder(path, marker=MANIFEST) as folder:
        write_tensor_file(folder / WEIGHTS, weights_of(weights))
        if weights.members:
            write_tensor_file(folder / OWNED_WEIGHTS, dict(owned_weights(weights)))
        try:
            save_file(moments, folder / OPTIMIZER)
            if replay:
                save_file(dict(replay), folder / REPLAY)
        except SafetensorError as error:
            raise NestlingError(f"cannot write {path / OPTIMIZER}: {error}; free some space") from error
        facts = {"step": step, "tokens": tokens, "rows": rows, "guard": dict(guard or {}), "run": run or {}}
        write_json(folder / STATE, facts)
        write_json(folder / MANIFEST, {file.name: _seal(file) for file in sorted(folder.iterdir())})
    for folder in _state_folders(steps):
        if int(folder.name) > step:
            remove_folder(folder)
    drop_old_states(steps, step=step, keep=keep)
    return path


def drop_old_states(steps: Path, *, step: int, keep: int) -> None:
    """Drop all but the newest `keep` states up to a step."""
    for old in [folder for folder in _state_folders(steps) if int(folder.name) <= step][keep:]:
        remove_folder(old)


def newest_state(steps: Path, *, before: int | None = None) -> tuple[TrainingState | None, list[str]]:
    """Return the newest state that verifies, and a line for each newer one that does not.

    Args:
        steps: the folder of states.
        before: look only at those of earlier steps.
    """
    damaged: list[str] = []
    for folder in _state_folders(steps):
        if before is not None and int(folder.name) >= before:
            continue
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
    for name in sorted({WEIGHTS, OPTIMIZER, STATE, *manifest}):
        if _seal(folder / name) != manifest.get(name):
            raise NestlingError(f"{folder / name} is missing or damaged; an older state will do")
    state = read_json(folder / STATE)
    return TrainingState(
        folder,
        state["step"],
        state["tokens"],
        state.get("rows"),
        state.get("data_offset", 0),
        state.get("guard", {}),
        state.get("run", {}),
    )


def _state_folders(steps: Path) -> list[Path]:
    """Return the state folders, the newest first."""
    folders = [path for path in steps.glob("[0-9]*") if path.is_dir() and path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name), reverse=True)


def _moments(model: ElasticLM, optimizer: Optimizer, *, wanted: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = gather(value)
            if wanted:
                yield f"{name}/{key}", tensor.cpu().contiguous()


def _seal(file: Path) -> str:
    """Return size and hash of a file; where it cannot be read, the error, which equals neither."""
    try:
        return f"{file.stat().st_size} {hash_files(file)}"
    except OSError as error:
        return str(error)
