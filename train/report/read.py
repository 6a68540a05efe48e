"""A run folder as the report sees it: metrics by kind, measured members, speeds, recipe, provenance.

`metrics.jsonl` is the source of truth. A resumed run may repeat a range of steps, so the last line for a
step wins; a line torn by a kill is skipped. `model/` and `decode.json` come last in a run and may be absent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError, UsageError
from models.base.files import naming, read_json
from models.base.paths import shown
from models.checkpoint.family import FAMILY_FILE, Member, read_family
from models.checkpoint.huggingface_config import config_from_hugging_face
from models.elastic.config import ElasticConfig
from train.recipe.recipe import FULL_NAME
from train.run.metrics import Line, read_metrics

FRONTIER = "frontier.json"
"""What `nestling search --budget` found; it writes the file beside the run's own."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder, read."""

    name: str
    train: list[Line]
    """Training lines by ascending step, as in the next fields."""
    valid: list[Line]
    samples: list[Line]
    members: list[Member]
    """Members as measured at the end; empty while the run has no model folder."""
    decode: dict[str, Any]
    """Speeds of plain and speculative decoding, if they were measured."""
    recipe: str
    provenance: dict[str, Any]
    gradients: list[Line] = field(default_factory=list)
    frontier: dict[str, Any] = field(default_factory=dict)
    """What `nestling search --budget` found, if it was run on this model."""

    @property
    def full(self) -> str | None:
        """Return the full model's name; None if nothing tells which one it is."""
        measured = [member.name for member in self.members if member.granularity == "full"]
        return next(iter([*measured, *(name for name in self.member_names if name == FULL_NAME)]), None)

    @property
    def member_names(self) -> list[str]:
        """Return every member that any line or the model folder names, in order of appearance."""
        trained = (key.removeprefix("loss/") for line in self.train for key in line if "loss/" in key)
        measured = (key.split("/")[1] for line in self.valid for key in line if key.startswith("valid/"))
        spoken = (line["member"] for line in self.samples)
        known = (member.name for member in self.members)
        return list(dict.fromkeys([*known, *trained, *measured, *spoken]))

    @property
    def seconds(self) -> float | None:
        """Return the training time; the clock in the lines starts again at every resume."""
        clocks = [line["seconds"] for line in self.train if "seconds" in line]
        pairs = zip(clocks, [*clocks[1:], 0.0], strict=True)
        return sum(now for now, following in pairs if following < now) if clocks else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; the same folder named twice counts once, equal names get their path.

    Raises:
        UsageError: if no folder is given or one does not exist.
        NestlingError: if one is not a run folder, or holds nothing to show.
    """
    if not folders:
        raise UsageError("no run folder was given; give one or more, such as checkpoints/<run>")
    unique = list({path.resolve(): path for path in map(Path, folders)}.values())
    names = [shown(path.resolve().name) for path in unique]
    return [
        _read_run(path, name if names.count(name) == 1 else shown(path))
        for path, name in zip(unique, names, strict=True)
    ]


def last_by_step(lines: Iterable[Line], kind: str, *also: str) -> list[Line]:
    """Return lines of one kind by step; the last one of those with equal step and `also` fields.

    >>> last_by_step([{"kind": "a", "step": 2, "x": 1}, {"kind": "a", "step": 2, "x": 1}], "a", "x")
    [{'kind': 'a', 'step': 2, 'x': 1}]
    """
    needed = also or ("tokens",)
    chosen = [line for line in lines if line.get("kind") == kind and all(key in line for key in needed)]
    last = {(line["step"], *(line[key] for key in also)): line for line in chosen}
    return sorted(last.values(), key=lambda line: line["step"])


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UsageError(f"run {path} {what}; give a run folder, such as checkpoints/<run>")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise NestlingError(f"{path} is not a run folder (no metrics.jsonl); give checkpoints/<run>")
    lines = read_metrics(metrics)
    train, valid = last_by_step(lines, "train"), last_by_step(lines, "valid")
    if not train and not valid:
        raise NestlingError(f"{metrics} has no train or valid line yet; wait for the run's first one")
    members, provenance = _read_model(path / "model")
    recipe, decode, frontier = (path / name for name in ("recipe.yaml", "decode.json", FRONTIER))
    return Run(
        name=name,
        train=train,
        valid=valid,
        samples=last_by_step(lines, "sample", "member", "prompt", "text"),
        members=members,
        decode=read_json(decode) if decode.is_file() else {},
        frontier=read_json(frontier) if frontier.is_file() else {},
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        provenance=provenance,
        gradients=last_by_step(lines, "gradient"),
    )


def _read_model(folder: Path) -> tuple[list[Member], dict[str, Any]]:
    if not (folder / FAMILY_FILE).is_file():
        return [], {}
    _, members, provenance = read_family(folder / FAMILY_FILE, _read_config(folder / "config.json"))
    return members, provenance


def _read_config(path: Path) -> ElasticConfig:
    fields = read_json(path)
    with naming(path):
        return config_from_hugging_face(fields)
