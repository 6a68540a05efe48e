"""The state of one request: its committed tokens, and the keys and values of all but the last."""

from dataclasses import dataclass

from models.elastic.cache import KVCache


@dataclass
class State:
    """The committed tokens of one request. The last one is pending: chosen, but not yet in the cache.

    Between rounds `cache.length == len(ids) - 1`.
    """

    ids: list[int]
    cache: KVCache
