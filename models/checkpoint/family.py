"""The family file of a model folder: its members, what was measured, where it came from.

{"format": 1, or 2 if members own weights (models/checkpoint/owned_file.py),
 "family": {"S": "ffn=0.125", ...},
 "members": [{"name", "granularity", "parameters", "loss", "perplexity", "match", "kl", "alpha"}],
 "owned": {"sha256", "members": {"S": {...}}},
 "provenance": {"recipe", "commit", "versions", "data", ...}}
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError
from models.base.files import naming, read_json, write_json
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY, Granularity

FAMILY_FILE = "nestling.json"
FORMAT, FORMAT_WITH_OWNED = 1, 2
"""A release that knows only the first must not open members without what they own."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One member of a family and its measurements; None where nothing was measured.

    Args:
        name: its name in the family, or the granularity's own text.
        granularity: its text.
        parameters: numbers in its extraction, a tied head counted once.
        loss: nats per token on validation text.
        perplexity: exp(loss).
        match: fraction of positions, in percent, where its greedy token is the full model's.
        kl: KL(p, q) in nats per token; p the full model, q the member.
        alpha: expected acceptance of one drafted token, the mean of sum min(p, q).
        owned_bytes: bytes of the weights that it has for itself beside the full model's.
    """

    name: str
    granularity: str
    parameters: int
    loss: float | None = None
    perplexity: float | None = None
    match: float | None = None
    kl: float | None = None
    alpha: float | None = None
    owned_bytes: int = 0


def write_family(
    path: Path,
    family: Mapping[str, Granularity],
    members: Iterable[Member],
    provenance: Mapping[str, Any],
    owned: Mapping[str, Any] | None = None,
) -> None:
    """Write `nestling.json`; what members own is described by models/checkpoint/owned_file.py."""
    write_json(
        path,
        {
            "format": FORMAT if owned is None else FORMAT_WITH_OWNED,
            "family": {name: str(granularity) for name, granularity in family.items()},
            "members": [_fields_of(member) for member in members],
            **({} if owned is None else {"owned": owned}),
            "provenance": dict(provenance),
        },
    )


def read_family(
    path: Path, config: ElasticConfig
) -> tuple[dict[str, Granularity], list[Member], dict[str, Any]]:
    """Return family, members and provenance; a folder without the file has the default family.

    Raises:
        NestlingError: naming the wrong part of the file.
    """
    if not path.is_file():
        return dict(DEFAULT_FAMILY), [], {}
    content = read_json(path)
    with naming(path):
        if content.get("format") not in (FORMAT, FORMAT_WITH_OWNED):
            read = f"{FORMAT} or {FORMAT_WITH_OWNED}"
            raise NestlingError(
                f"format={content.get('format')!r} is not {read}, which this release reads; "
                "use the release that wrote it"
            )
        family = {name: _granularity(text, config) for name, text in _part(content, "family", dict).items()}
        members = [_member(item) for item in _part(content, "members", list)]
        return family, members, _part(content, "provenance", dict)


def _fields_of(member: Member) -> dict[str, Any]:
    """Return what is written of a member: of one that owns nothing, no more than earlier releases read."""
    fields = dataclasses.asdict(member)
    return {name: value for name, value in fields.items() if name != "owned_bytes" or value}


def _part(content: Mapping[str, Any], name: str, kind: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        raise NestlingError(f"{name}={value!r} is not a {kind.__name__}; restore the file, or delete it")
    return value


def _granularity(text: object, config: ElasticConfig) -> Granularity:
    granularity = Granularity.parse(str(text), {})
    granularity.resolve(config)
    return granularity


def _member(item: object) -> Member:
    fields = {field.name: field for field in dataclasses.fields(Member)}
    if not isinstance(item, dict) or set(item) - set(fields):
        raise NestlingError(f"member {item!r} is not one; its fields are {', '.join(fields)}")
    kinds = {"name": str, "granularity": str, "parameters": int, "owned_bytes": int}
    item = dict[str, Any]({"owned_bytes": 0}) | item
    for name in fields:
        kind = kinds.get(name, (int, float, type(None)))
        if not isinstance(item.get(name), kind):
            raise NestlingError(f"member {item!r}: {name}={item.get(name)!r} is of the wrong kind")
    return Member(**item)
