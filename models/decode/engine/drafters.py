"""Drafts that are no member and no folder, by the name that `--draft` takes: a new one is entered here.

Each is made from the target. Heavy imports are left to the functions, since recipes read the names.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.decode.engine.draft import Draft
    from models.elastic.model import ElasticLM


def _lookup(target: "ElasticLM") -> "Draft":
    from models.decode.engine.lookup import LookupDraft

    del target  # copies need no model
    return LookupDraft()


DRAFTERS: "Mapping[str, Callable[[ElasticLM], Draft]]" = {"lookup": _lookup}
