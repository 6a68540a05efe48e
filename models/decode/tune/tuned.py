"""What `nestling search --draft` found for a model on this machine: written once, read by `--draft auto`.

{"format": 1,
 "choices": [{"temperature", "verifier", "draft", "vocabulary", "gamma", "predicted", "measured"}],
 "results": of the confirmed drafts, "card"}

One file in the user's cache folder for each machine, model and dtype. The best choice of a temperature
comes first. A model is known by the content of its weights: one that was trained further is another.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError
from models.base.files import default_cache_dir, read_json, write_json
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED
from models.machine.card import this_machine

FORMAT = 1
PLAIN = "none"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best draft for one law and verifier."""

    temperature: float
    """0 is greedy."""
    verifier: str
    draft: str
    """A granularity, with its precision behind an `@` if that is not the target's own; `none`: plain."""
    vocabulary: tuple[int, ...] | None
    """Tokens that the draft may propose; None for all."""
    gamma: int
    predicted: float
    """Speed over plain decoding."""
    measured: float | None
    """The same, from real decoding; None where only the prediction is known."""


def searched_path(folder: Path, dtype: str) -> Path:
    """Where the result for a model folder in a dtype is kept on this machine.

    Raises:
        OSError: if the weights cannot be read.
    """
    return default_cache_dir() / f"draft-{this_machine().key}-{_weights_key(folder)}-{dtype}.json"


def write_searched(path: Path, choices: Iterable[Found], more: Mapping[str, Any]) -> None:
    """Keep what was found, and what else may be of use to a reader; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [dict(vars(choice)) for choice in choices]
    write_json(path, {"format": FORMAT, "choices": fields, **more})


def find_draft(folder: Path, dtype: str, params: SamplingParams, verifier: str | None = None) -> Found | None:
    """The best draft for a model folder in a dtype on this machine; None if none was ever looked for.

    Args:
        folder: the model folder.
        dtype: that it runs in.
        params: the law. What was found for the temperature nearest to it is taken, greedy only for greedy.
        verifier: a name; None leaves the choice, though not of `coupled`, whose output is another.
    """
    path = searched_path(folder, dtype)
    alike = [one for one in _read(path) if (one.temperature == 0) == params.is_greedy]
    if not params.is_greedy:
        alike = [
            one
            for one in alike
            if (one.verifier != COUPLED if verifier is None else one.verifier == verifier)
        ]
    return min(alike, key=lambda one: abs(one.temperature - params.temperature), default=None)


def _read(path: Path) -> list[Found]:
    """The choices of a file; none if there is no file or it is damaged."""
    if not path.exists():
        return []
    try:
        content = read_json(path)
        if content.get("format") != FORMAT:
            return []
        return [_found(fields) for fields in content["choices"]]
    except (NestlingError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s is damaged (%s); run nestling search again", path, error)
        return []


def _found(fields: Mapping[str, Any]) -> Found:
    vocabulary = fields["vocabulary"]
    measured = fields["measured"]
    return Found(
        temperature=float(fields["temperature"]),
        verifier=str(fields["verifier"]),
        draft=str(fields["draft"]),
        vocabulary=None if vocabulary is None else tuple(map(int, vocabulary)),
        gamma=int(fields["gamma"]),
        predicted=float(fields["predicted"]),
        measured=None if measured is None else float(measured),
    )


def _weights_key(folder: Path) -> str:
    """A short name of the weights' content and shape."""
    total = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
