"""The identity of a run: recipe, text, tokenizer, start and teacher; what is of another run is refused.

A state of other text would go on with a tokenizer that its weights never saw, so such a run is refused before
anything is written. What may change on the way (how long, how many rows a step) is told in a line.

    run folder   recipe.yaml  data.json        steps/<n>/state.json   "run": recipe and data of that state
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError, UsageError
from models.base.files import read_json
from models.checkpoint.family import FAMILY_FILE
from train.data.module import TextData
from train.objective.teacher import Teacher
from train.recipe.recipe import Recipe, load_saved_recipe
from train.recipe.settings import as_table, show
from train.run.optim import learning_rate_factor
from train.run.start import Start

RECIPE_FILE = "recipe.yaml"
DATA_FILE = "data.json"
SET_BY_TOKENS = {"optim.warmup_steps", "loss.ramp_start", "loss.ramp_steps"}
"""Keys by which a run of another length is another run, and which nobody writes."""
FREE_TO_CHANGE = (
    "trainer",
    "tracking",
    "model.blend",
    "data.cache_dir",
    "data.num_workers",
    "distill.device",
    "distill.timeout",
)
"""Sections and keys of a recipe that a resumed run may change."""
FREE_NAMES = ("family.", "sampler.probabilities.", "sampler.turns.")
"""Tables whose keys are the user's own."""
TOLD = ("max_steps", "batch_size", "accumulate_grad_batches", "gradient_clip_val")
"""Keys of `trainer` that change what a resumed run computes."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A run as its folder or one of its states tells of it; what is not known is empty or None.

    Args:
        recipe: as nested dictionaries.
        tokens: hash of the token streams.
        tokenizer: hash of the tokenizer.
        source: name of the text.
        teacher: hash of the teacher's weights.
        start: hash of the weights that it began from.
        dtype: that it trains in.
    """

    recipe: Mapping[str, Any]
    tokens: str | None = None
    tokenizer: str | None = None
    source: str | None = None
    teacher: str | None = None
    start: str | None = None
    dtype: str | None = None

    @property
    def data(self) -> dict[str, Any]:
        """All but the recipe, as `data.json` holds it."""
        return {name: value for name, value in asdict(self).items() if name != "recipe"}

    @staticmethod
    def read(fields: Mapping[str, Any]) -> "Identity":
        """Make an identity from the fields of a JSON object; unknown ones are left out."""
        known = {name: fields[name] for name in Identity.__dataclass_fields__ if name in fields}
        return Identity(**{"recipe": {}, **known})


def identify(
    recipe: Recipe, data: TextData, teacher: Teacher | None, dtype: str, start: Start | None = None
) -> Identity:
    """Return the run that a recipe and its prepared data make."""
    return Identity(
        recipe=as_table(recipe),
        tokens=data.tokens_sha256,
        tokenizer=data.text_tokenizer.sha256,
        source=recipe.data.source,
        teacher=teacher.record["sha256"] if teacher else None,
        start=start.sha256 if start else None,
        dtype=dtype,
    )


def read_identity(folder: Path) -> Identity | None:
    """Return the identity of the run in a folder; None if there is no run."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    recipe = as_table(load_saved_recipe(folder / RECIPE_FILE))
    if (folder / DATA_FILE).is_file():
        return Identity.read({**read_json(folder / DATA_FILE), "recipe": recipe})
    model = folder / "model" / FAMILY_FILE  # of a run that finished before there was a data.json
    data = (read_json(model).get("provenance") or {}).get("data") or {} if model.is_file() else {}
    return Identity(recipe=recipe, tokenizer=(data.get("tokenizer") or {}).get("sha256"))


def check_recipe(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with another recipe.

    Args:
        ours: the recipe of this command, as nested dictionaries.
        theirs: the recipe of what stands there.
        where: what stands there, as in `--out r1`.

    Raises:
        UsageError: naming each key with both values.
    """
    changed = {
        key: f"{key}={show(before, limit=200)} (now {show(now, limit=200)})"
        for key, now, before in _differences(ours, theirs)
        if key not in FREE_TO_CHANGE and key.partition(".")[0] not in FREE_TO_CHANGE
    }
    if changed:
        first = list(changed.values())[:4]
        shown = f"{', '.join(first)}{f' and {len(changed) - 4} more' if len(changed) > 4 else ''}"
        dialled = "tokens=... sets that; to train longer, keep it as it was and set trainer.max_steps. "
        raise UsageError(
            f"{where} holds a run with {shown}; {dialled if SET_BY_TOKENS & changed.keys() else ''}"
            "Give it what it had, choose another --out, or start over with --resume never"
        )


def check_same_run(ours: Identity, theirs: Identity, where: str) -> None:
    """Refuse to go on with what belongs to another run; what is not known of it is not compared.

    Raises:
        UsageError: naming both.
    """
    if theirs.recipe:
        check_recipe(ours.recipe, theirs.recipe, where)
    for what, now, before in (
        ("data", ours.tokens, theirs.tokens),
        ("data (its tokenizer)", ours.tokenizer, theirs.tokenizer),
    ):
        if before is not None and now != before:
            raise UsageError(
                f"{where} holds a run on other {what}: hash {_short(before)}, now {_short(now)} "
                f"(data.source={ours.source}); use another --out or the old data, "
                "or start over with --resume never"
            )
    for what, now, before in (
        ("model.from", ours.start, theirs.start),
        ("loss.teacher", ours.teacher, theirs.teacher),
    ):
        if before is not None and now != before:
            raise UsageError(
                f"{where} holds a run with another {what}: hash {_short(before)}, now {_short(now)}; "
                "restore its weights, choose another --out, or start over with --resume never"
            )


def what_changes(recipe: Recipe, ours: Identity, theirs: Identity, *, step: int, row: int) -> list[str]:
    """Return a line for each changed setting that shifts what comes; none if all is as it was.

    Args:
        recipe: as it is now.
        ours: the run as it is now.
        theirs: the run as the state left it.
        step: where it goes on.
        row: the next row that it reads.
    """
    now, before = recipe.trainer, dict(theirs.recipe.get("trainer", {}))
    changed = {key: before[key] for key in TOLD if key in before and before[key] != getattr(now, key)}
    lines = [f"trainer.{key}={show(getattr(now, key))}, was {show(was)}" for key, was in changed.items()]
    if "max_steps" in changed:
        rates = [
            recipe.optim.lr * learning_rate_factor(step, recipe.optim, steps)
            for steps in (now.max_steps, changed["max_steps"])
        ]
        lines[0] += (
            f": the learning rate goes on from {rates[0]:.3g}, where it would have been {rates[1]:.3g}, "
            f"and is lowest at step {now.max_steps}; what fades by loss.fade_from follows"
        )
    if {"batch_size", "accumulate_grad_batches"} & set(changed):
        lines.append(
            f"a step reads {now.rows_per_step} rows now, from row {row} on: none is skipped or read again"
        )
    if theirs.dtype not in (None, ours.dtype):
        lines.append(f"dtype={recipe.dtype} is {ours.dtype} here, was {theirs.dtype}")
    return lines


def check_shapes(
    expected: Mapping[str, Iterable[int]], saved: Mapping[str, Iterable[int]], where: Path
) -> None:
    """Refuse weights of another model.

    Args:
        expected: name and shape of each of the model's weights.
        saved: name and shape of each tensor on disk.
        where: the file.

    Raises:
        NestlingError: naming the first that does not fit, with both shapes.
    """
    for name, shape in expected.items():
        there = list(saved[name]) if name in saved else "absent"
        if there != list(shape):
            raise NestlingError(
                f"{where} is of another model: {name} is {there}, here {list(shape)}; "
                "choose a state of this recipe"
            )


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    known_to_both = ours.keys() & theirs.keys()  # a setting that only one release has tells nothing
    for name in sorted({*ours, *theirs} if prefix in FREE_NAMES else known_to_both):
        now, before = ours.get(name), theirs.get(name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            yield from _differences(now, before, f"{prefix}{name}.")
        elif _plain(now) != _plain(before):
            yield f"{prefix}{name}", now, before


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # JSON knows no tuples


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
