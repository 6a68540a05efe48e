"""Samples side by side: what in a member's text is not the full model's."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

TOKEN = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Comparison:
    """A text in pieces, each the same as in the reference or not, and the fraction that is."""

    pieces: tuple[tuple[str, bool], ...]
    same: float


def compare(text: str, reference: str) -> Comparison:
    """Split `text` into pieces that `reference` has in this order, and pieces that it has not.

    >>> compare("a red fox ran", "a brown fox ran").pieces
    (('a ', True), ('red', False), (' fox ran', True))
    >>> compare("same", "same").same
    1.0
    """
    ours, theirs = TOKEN.findall(text), TOKEN.findall(reference)
    if not ours:
        return Comparison((), 1.0 if not theirs else 0.0)
    blocks = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks()
    pieces, start = [], 0
    for block in blocks:
        pieces += [(_join(ours[start : block.b]), False), (_join(ours[block.b : block.b + block.size]), True)]
        start = block.b + block.size
    same = sum(block.size for block in blocks) / max(len(ours), len(theirs))
    return Comparison(tuple(piece for piece in pieces if piece[0]), same)


def _join(tokens: Sequence[str]) -> str:
    return "".join(tokens)
