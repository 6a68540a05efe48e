"""The defaults that follow from the model that a run begins from: its shape, its family, a gentle schedule.

They stand below everything that is given, so that a key which contradicts the model's shape stays and is
refused by its name (train/run/start.py).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig
from train.recipe.sections import ModelConfig

HEALING: Mapping[str, Any] = {
    "optim.lr": 5e-4,
    "optim.warmup_steps": 20,
    "optim.weight_decay": 0.0,
    "loss.divergence": "neg_log_alpha",
    "loss.ramp_start": 0,
    "loss.ramp_steps": 0,
    "loss.fade_to": 1.0,
    "loss.hidden_weight": 6.0,
    "loss.narrow_gradient": 0.3,
    "loss.exit_gradient": 0.3,
    "owned.norms": True,
    "owned.lr": 2e-3,
    "owned.min_lr_ratio": None,
    "sampler.row_fraction": 1.0,
    "sampler.shared_cache": 0.5,
    "sampler.turns_power": 0.5,
}
"""A trained model needs neither a high learning rate nor text before its members learn from it; what members
own, which learns fast, and a weak pull at what they share, leave the full model as good as it was
(docs/LOG.md)."""
LR_TIMES_WIDTH = 0.0576
"""A learning rate suits a width inversely (2203.03466): 1e-4 for SmolLM2's 576, to which 5e-4 did harm."""
RANK = 48
"""Rank of a draft's additions, for models at least twelve times as wide."""
DRAFTING: Mapping[str, Any] = {
    "optim.lr": 2e-3,
    "owned.lr": None,
    "loss.divergence": "total_variation",
    "loss.weight": 0.9,
    "loss.text_weight": 0.1,
    "loss.trust": 0.0,
    "sampler.exit_stride": 1,
    "sampler.shared_cache": 1.0,
}
"""With model.train=owned, members are drafts: they learn what is accepted, on the full model's own cache."""


def implied_by_start(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a recipe with `model.from`, by dotted key; none without it.

    Raises:
        UsageError: if no model is there.
        NestlingError: naming a file of it that is damaged.
    """
    start = (tables.get("model") or {}).get("from")
    if not isinstance(start, str):
        return {}
    from models.checkpoint.family import FAMILY_FILE, read_family  # torch comes with them
    from models.checkpoint.owned_file import read_owners

    config, is_owned = read_start_config(start), tables["model"].get("train") == "owned"
    implied = {**HEALING, "optim.lr": min(HEALING["optim.lr"], LR_TIMES_WIDTH / config.hidden_size)}
    implied |= DRAFTING if is_owned else {}
    if is_owned:
        implied["owned.rank"] = min(RANK, max(1, config.hidden_size // 12))
    implied |= {f"model.{name}": value for name, value in shape_of(config).items()}
    family_file = Path(start).expanduser() / FAMILY_FILE
    owners = read_owners(family_file)
    if owners:  # what they own goes on learning
        own = owners[0].ownership
        implied |= {"owned.norms": own.norms, "owned.rank": own.rank, "owned.alpha": own.alpha}
    if is_owned:
        drafts = {one.name: str(one.granularity) for one in owners}
        return {**implied, "family": drafts or {"D": draft_of(config.num_hidden_layers)}}
    if not family_file.is_file():
        return implied
    members, _, _ = read_family(family_file, config)
    return {**implied, "family": {name: str(one) for name, one in members.items()}}


def draft_of(num_layers: int) -> str:
    """Return the granularity of a draft: the first fifteenth of the layers, and the last seven fifteenths.

    The last layers read what the full model's deep layers wrote into the cache that they share, so that they
    know of the text what the first ones cannot. So many are worth their time in 4 bits (docs/LOG.md).

    >>> draft_of(30) == f"layers=0:1:{':'.join(map(str, range(16, 30)))}"
    True
    >>> draft_of(16), draft_of(5), draft_of(2)
    ('layers=0:9:10:11:12:13:14:15', 'layers=0:3:4', 'ffn=0.5')
    """
    if num_layers < 3:
        return "ffn=0.5"
    first, last = max(1, num_layers // 15), max(1, num_layers * 7 // 15)
    return f"layers={':'.join(map(str, [*range(first), *range(num_layers - last, num_layers)]))}"


def read_start_config(start: str) -> ElasticConfig:
    """Return the shape of the model that `model.from` names; its weights are not read.

    Raises:
        UsageError: if there is no model.
        NestlingError: if its config.json is missing, damaged or of a kind that cannot be held.
    """
    from models.checkpoint.folder import read_config

    try:
        return read_config(Path(start).expanduser())
    except UsageError as error:
        raise UsageError(f"model.from={start}: {error}") from None


def shape_of(config: ElasticConfig) -> dict[str, Any]:
    """Return the settings of a recipe's `model` section that a model's shape decides, by name."""
    names = [field.name for field in dataclasses.fields(ModelConfig) if hasattr(config, field.name)]
    return {name: getattr(config, name) for name in names}
