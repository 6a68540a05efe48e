"""Prompts that begin alike are read once: the keys and values of their common tokens are copied.

Texts that are being written and the last ones that were share what they have committed. A text that would
share a prompt which is just being read waits for it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from models.decode.engine.state import State
from models.elastic.cache import KVCache

LEAST_SHARED = 16
"""Fewer tokens are read again: that is as fast."""


@dataclass(eq=False)
class Text:
    """A text whose keys and values are here."""

    key: Hashable
    """The model's: others mean other keys and values."""
    state: State
    num_prompt: int
    is_live: bool = True
    """False once nothing is written any more."""

    @property
    def num_bytes(self) -> int:
        """Size of its keys and values."""
        return self.state.cache.num_bytes

    @property
    def is_reading(self) -> bool:
        """True while the prompt is read."""
        return self.is_live and self.state.cache.length < self.num_prompt


class Prefixes:
    """The texts whose keys and values are in memory, within a budget.

    Args:
        budget: bytes of all of them.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._texts: list[Text] = []  # the one that was used last is at the end

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts that are kept."""
        return sum(text.num_bytes for text in self._texts)

    @property
    def num_live_bytes(self) -> int:
        """Bytes of the texts that are being written."""
        return sum(text.num_bytes for text in self._texts if text.is_live)

    def make_room(self, num_bytes: int) -> bool:
        """Forget texts that are finished until there is room; False if there is none even so."""
        if self.num_live_bytes + num_bytes > self.budget:
            return False
        for text in [text for text in self._texts if not text.is_live]:
            if self.num_bytes + num_bytes <= self.budget:
                break
            self._texts.remove(text)
        return True

    def must_wait(self, key: Hashable, ids: Sequence[int]) -> bool:
        """Return whether a prompt that is just being read has more to share than is there now."""
        reading = [text for text in self._texts if text.is_reading and text.key == key]
        coming = max((_num_common(text.state.ids, ids[:-1]) for text in reading), default=0)
        return coming >= LEAST_SHARED and coming > self._best(key, ids)[0]

    def fill(self, cache: KVCache, key: Hashable, ids: Sequence[int]) -> int:
        """Copy what a prompt shares with a text, but never its last token; return how many tokens."""
        length, text = self._best(key, ids)
        if text is None or length < LEAST_SHARED:
            return 0
        cache.copy_from(text.state.cache, length)
        self._texts.remove(text)
        self._texts.append(text)
        return length

    def add(self, text: Text) -> None:
        """Keep a text."""
        self._texts.append(text)

    def _best(self, key: Hashable, ids: Sequence[int]) -> tuple[int, Text | None]:
        found = [
            (min(text.state.cache.length, _num_common(text.state.ids, ids[:-1])), text)
            for text in self._texts
            if text.key == key
        ]
        return max(found, key=lambda one: one[0], default=(0, None))


def _num_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return the length of the common beginning, in few comparisons of slices.

    >>> _num_common([1, 2, 3, 4], [1, 2, 4])
    2
    """
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
