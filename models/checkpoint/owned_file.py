"""What members own, in a model folder: `owned.safetensors`, which `nestling.json` describes.

    "owned": {"sha256": ..., "members": {"S": {"granularity", "norms", "rank", "alpha", "bytes"}}}

The tensors are called like the full model's, behind the member's name: `S.layers.0.input_layernorm.weight`,
`S.layers.0.mlp.gate_proj.lora_A.weight`, `S.norm.weight`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.base.errors import NestlingError, UsageError
from models.base.files import hash_files, naming, read_json
from models.checkpoint.tensor_file import write_tensor_file
from models.checkpoint.weights import OWNED_WEIGHTS, check_tensors, read_tensors
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.ownership import Owner, Ownership
from models.elastic.owning import adopt, owned_weights

KEY = "owned"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "granularity": str,
    "norms": bool,
    "rank": int,
    "alpha": (int, float),
    "bytes": int,
}


def write_owned(folder: Path, model: ElasticLM) -> dict[str, Any] | None:
    """Write the file, and return what `nestling.json` says of it; None and no file if nothing is owned.

    Raises:
        OSError: if the disk refuses.
    """
    if not model.members:
        return None
    write_tensor_file(folder / OWNED_WEIGHTS, dict(owned_weights(model)))
    members = {
        one.name: {
            "granularity": str(one.granularity),
            "norms": one.ownership.norms,
            "rank": one.ownership.rank,
            "alpha": one.ownership.alpha,
            "bytes": one.num_bytes,
        }
        for one in model.members
    }
    return {"sha256": hash_files(folder / OWNED_WEIGHTS), "members": members}


def read_owned(family_file: Path, model: ElasticLM) -> None:
    """Give the members of a model that was just opened what they own.

    Args:
        family_file: `nestling.json`, which may be absent.
        model: the model of that folder.

    Raises:
        NestlingError: if the description and the file do not fit each other or the model.
    """
    path = family_file.with_name(OWNED_WEIGHTS)
    described, owners = _described(family_file), read_owners(family_file)
    if described is None:
        if path.is_file():
            raise NestlingError(
                f"{path} holds what members own, but {family_file.name} does not name it; restore "
                f"{family_file.name}, or delete {path.name} to open the full model with plain members"
            )
        return
    tensors = read_tensors(path)
    found = hash_files(path)
    if found != described.get("sha256"):
        raise NestlingError(
            f"{path} is not the one that {family_file.name} was written with (SHA-256 {found[:12]}, there "
            f"{str(described.get('sha256'))[:12]}); restore both from one place"
        )
    with naming(path):
        for name, granularity, _ in owners:
            if granularity.resolve(model.config).is_full:
                raise NestlingError(f"{name} is {granularity}, and the full model owns nothing; restore it")
        expected = {
            f"{name}.{inside}": torch.Size(shape)
            for name, granularity, ownership in owners
            for inside, shape in ownership.shapes(model.config, granularity).items()
        }
        adopt(model, owners, check_tensors(expected, tensors))


def read_owners(family_file: Path) -> list[Owner]:
    """Return the members that own weights, and what kinds; none where nothing is owned.

    Raises:
        NestlingError: naming the wrong part of `nestling.json`.
    """
    described = _described(family_file)
    with naming(family_file):
        return [] if described is None else _owners(described)


def _described(family_file: Path) -> Any:
    return read_json(family_file).get(KEY) if family_file.is_file() else None


def _owners(described: object) -> list[Owner]:
    members = described.get("members") if isinstance(described, dict) else None
    if not isinstance(members, dict):
        raise NestlingError(f"{KEY}={described!r} is not a table with members; restore the file")
    return [Owner(str(name), *_kinds(name, fields)) for name, fields in members.items()]


def _kinds(name: str, fields: object) -> tuple[Granularity, Ownership]:
    if not isinstance(fields, Mapping):
        raise NestlingError(f"{KEY}: {name}={fields!r} is not a table; restore the file")
    for key, kind in _FIELDS.items():
        value = fields.get(key)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise NestlingError(f"{KEY}: {name}.{key}={value!r} is of the wrong kind; restore the file")
    if not 0 <= fields["rank"] <= 2**14 or not 0 <= fields["alpha"] < float("inf"):
        shown = f"rank={fields['rank']}, alpha={fields['alpha']}"
        raise NestlingError(f"{KEY}: {name} has {shown}, which cannot be; restore the file")
    try:
        granularity = Granularity.parse(fields["granularity"], {})
    except UsageError as error:
        raise NestlingError(f"{KEY}: {name}: {error}") from None
    ownership = Ownership(norms=fields["norms"], rank=fields["rank"], alpha=float(fields["alpha"]))
    return granularity, ownership
