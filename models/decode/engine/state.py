"""What decoding has settled so far: the tokens, and the keys and values of all but the last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from models.decode.engine.trimmed_head import FewTokens
from models.elastic.cache import Batch, KVCache
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.packed.decode_step import Tokens
from models.packed.quantize import PackedLM

Model: TypeAlias = ElasticLM | View
"""Anything that decodes: the elastic model, or a member of it in place."""
Scorer: TypeAlias = Model | FewTokens
"""Anything that drafts."""


@dataclass
class State:
    """The settled tokens of one request. The last one is pending: chosen, but not yet in the cache.

    Between rounds `cache.length == len(ids) - 1`.
    """

    ids: list[int]
    cache: KVCache


def elastic_model(model: Scorer) -> ElasticLM:
    """The model whose weights these are."""
    return model if isinstance(model, ElasticLM) else model.model


def granularity_of(model: Scorer) -> Granularity:
    """How much of these weights runs."""
    if isinstance(model, ElasticLM):
        return FULL
    return model.granularity if isinstance(model, View) else model.view.granularity


def new_cache(model: Model, num_positions: int) -> KVCache:
    """An empty cache for one row, in the model's dtype for it and on its device."""
    whole = elastic_model(model)
    return KVCache(whole.config, num_positions=num_positions, dtype=whole.cache_dtype, device=whole.device)


def score(model: Scorer, ids: Sequence[int], cache: KVCache, *, num_last: int) -> Tensor:
    """Logits [T, V] of tokens that follow what the cache has committed; see `ElasticLM.score`."""
    if isinstance(model, ElasticLM):
        return model.score(ids, FULL, cache, num_last=num_last)
    return model.score(ids, cache, num_last=num_last)


def score_together(model: Scorer, requests: Sequence[Tokens]) -> Tensor:
    """The same for several requests, whose tokens share one pass; the rows of the first come first.

    Tokens may be drawn where the model `chooses`.
    """
    whole, granularity = elastic_model(model), granularity_of(model)
    few = model if isinstance(model, FewTokens) else None
    if isinstance(whole, PackedLM) and whole.native is not None:
        rows_TN = whole.native(requests, granularity, None if few is None else few.native_head)
        # The likeliest tokens are drawn without anybody looking at what they were drawn from.
        if few is None or all(one.draws is not None and not one.are_laws for one in requests):
            return rows_TN
        return few.among_all(rows_TN, laws=_are_laws(requests))
    ids, counts = [token for one in requests for token in one.ids], [len(one.ids) for one in requests]
    tokens_BT = torch.tensor([ids], device=whole.device)
    memory = Batch([one.cache for one in requests], counts)
    parts = whole.states(tokens_BT, granularity, memory)[-1][0].split(counts)
    scored_TD = torch.cat([part_TD[-one.num_last :] for part_TD, one in zip(parts, requests, strict=True)])
    return whole.head(scored_TD) if few is None else few.head(scored_TD)


def _are_laws(requests: Sequence[Tokens]) -> bool:
    """Whether all rows are: drafts of a batch are alike in that."""
    found = {one.are_laws and one.num_last == 1 for one in requests}
    assert len(found) == 1, requests
    return found.pop()
