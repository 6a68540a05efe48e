"""Results of `nestling search --draft` for a model on this machine: written once, read by `--draft auto`.

{"format": 1,
 "choices": [{"temperature", "verifier", "draft", "vocabulary", "gamma", "predicted", "measured"}],
 "results": of the confirmed drafts, "card"}

One file in the user's cache folder for each machine, model and dtype. The best choice of a temperature
comes first. A model is known by the content of its weights: one that was trained further is another.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from models.base.errors import NestlingError
from models.base.files import default_cache_dir, read_json, write_json
from models.checkpoint.weights import hash_family
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED
from models.decode.tune.draft_plan import DraftPlan
from models.machine.card import this_machine

FORMAT = 1

_log = logging.getLogger(__name__)


Plans: TypeAlias = Mapping[float, Sequence[DraftPlan]]
"""Plans by temperature (0 is greedy), the best first; one for each verifier that was searched for."""


def searched_path(folder: Path, dtype: str) -> Path:
    """Return where the result for a model folder in a dtype is kept on this machine.

    Raises:
        OSError: if the weights cannot be read.
    """
    config = b"" if folder.is_file() else (folder / "config.json").read_bytes()  # a GGUF file says it itself
    content = config + hash_family(folder, cached=True).encode()  # a stale draft is exact, too
    key = hashlib.sha256(content).hexdigest()[:16]
    return default_cache_dir() / f"draft-{this_machine().key}-{key}-{dtype}.json"


def write_searched(path: Path, plans: Plans, more: Mapping[str, Any]) -> None:
    """Keep what was found, and what else may be of use to a reader; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    choices = [
        {"temperature": temperature, **plan.as_dict()} for temperature, each in plans.items() for plan in each
    ]
    write_json(path, {"format": FORMAT, "choices": choices, **more})


def find_draft(
    folder: Path, dtype: str, params: SamplingParams, verifier: str | None = None
) -> DraftPlan | None:
    """Return the best plan for a model folder in a dtype on this machine; None if none was ever looked for.

    Args:
        folder: the model folder.
        dtype: that it runs in.
        params: settings of sampling. What was found for the nearest temperature is taken; greedy only for
            greedy.
        verifier: a name; None leaves the choice, though not of `coupled`, which writes another text.
    """
    plans: dict[float, DraftPlan] = {}
    for temperature, plan in _read(searched_path(folder, dtype)):
        fits = plan.verifier != COUPLED if verifier is None else plan.verifier == verifier
        if (temperature == 0) == params.is_greedy and (params.is_greedy or fits):
            plans.setdefault(temperature, plan)
    nearest = min(plans, key=lambda one: abs(one - params.temperature), default=None)
    return None if nearest is None else plans[nearest]


def _read(path: Path) -> list[tuple[float, DraftPlan]]:
    """Return temperatures and plans of a file; none if there is no file or it is damaged."""
    if not path.exists():
        return []
    try:
        content = read_json(path)
        if content.get("format") != FORMAT:
            return []
        return [(float(one["temperature"]), DraftPlan.from_dict(one)) for one in content["choices"]]
    except (NestlingError, KeyError, TypeError, ValueError) as error:
        _log.warning("%s is damaged (%s); run nestling search again", path, error)
        return []
