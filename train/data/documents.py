"""Pure functions of documents: hashes, the split, pieces, a sample, and checks of a text field.

A document goes to validation by a hash of its own text. So the split does not depend on order, number
of processes or documents added later, and a document that occurs twice cannot sit on both sides.
"""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator

from models.base.errors import UsageError

Check = Callable[[object, str, str, str], str]
"""Maps what a field holds, its name, where it stands and the setting to a document, or refuses it."""
PIECE_CHARS = 1 << 20
"""Longer documents are tokenized in pieces: bounded memory, and work for every core."""


def content_hash(text: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends on the text and the purpose alone.

    >>> content_hash("once", "split") == content_hash("once", "split")
    True
    >>> content_hash("once", "split") == content_hash("once", "sample")
    False
    """
    digest = hashlib.blake2b(text.encode(), digest_size=6, person=purpose.encode()).digest()
    return int.from_bytes(digest) / 2**48


def is_validation(text: str, valid_fraction: float) -> bool:
    """Return whether this document is held out.

    >>> sum(is_validation(str(number), 0.1) for number in range(1000))
    113
    """
    return valid_fraction > 0 and content_hash(text, "split") < valid_fraction


def hash_documents(documents: Iterable[str]) -> str:
    """Return the hex sha256 of documents; their lengths are hashed too, so that borders count.

    >>> hash_documents(["ab", "c"]) == hash_documents(["a", "bc"])
    False
    """
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode()
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def split_into_pieces(text: str, size: int = PIECE_CHARS) -> Iterator[str]:
    r"""Cut a long text at the first line end past each `size` characters; joined, it is the text.

    A text without line ends is cut at twice the size. The cut is where a tokenizer would mostly cut too.

    >>> list(split_into_pieces("one\ntwo\nthree", size=3))
    ['one\n', 'two\n', 'three']
    """
    start = 0
    while len(text) - start > size:
        end = text.find("\n", start + size, start + 2 * size) + 1 or start + 2 * size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def sample_documents(documents: Iterable[str], max_chars: int) -> list[str]:
    """Return at most `max_chars` characters, drawn evenly from all the documents in one pass.

    It keeps the pieces with the smallest hashes, in their order: memory stays bounded, and the sample is
    the same on every run. It holds at least one piece.

    >>> sample_documents(["a" * 9, "b" * 9, "c" * 9], max_chars=20)
    ['bbbbbbbbb', 'ccccccccc']
    """
    kept: list[tuple[float, int, str]] = []  # a heap with the largest hash on top
    num_chars = 0
    pieces = (piece for text in documents for piece in split_into_pieces(text))
    for number, piece in enumerate(pieces):
        heapq.heappush(kept, (-content_hash(piece, "sample"), number, piece))
        num_chars += len(piece)
        while num_chars > max_chars and len(kept) > 1:
            num_chars -= len(heapq.heappop(kept)[2])
    return [piece for _, _, piece in sorted(kept, key=lambda entry: entry[1])]


def field_setting(key: str, *, messages: bool = False) -> str:
    """Return the setting of the field that is read where a source came from `key`, a setting or a flag.

    >>> field_setting("data.valid"), field_setting("--data"), field_setting("data.valid", messages=True)
    ('data.text_field', '--text-field', 'data.messages_field')
    """
    if messages:
        return "data.messages_field"
    return "--text-field" if key.startswith("--") else "data.text_field"


def require_field(
    fields: Iterable[str], text_field: str, where: str, setting: str = "data.text_field"
) -> None:
    """Check that the text field exists.

    Raises:
        UsageError: naming the fields that do exist.
    """
    names = list(fields)
    if text_field not in names:
        raise UsageError(
            f"{setting}={text_field!r}: {where} has no such field; it has: {', '.join(names) or 'none'}"
        )


def checked_text(value: object, text_field: str, where: str, setting: str = "data.text_field") -> str:
    """Return a text that can be written as UTF-8: half a surrogate pair, which JSON can hold, is replaced.

    Raises:
        UsageError: if the value is no text.
    """
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UsageError(f"{setting}={text_field!r}: {where} holds {kind}, not text; name another field")
    if value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
