"""Messages between a device that drafts and a server that verifies: token ids, and nothing else of a text.

    open     JSON     what the client has: protocol, tokenizer, vocabulary, settings, prompt and committed ids
    opened   JSON     the session, the server's limits, and all that is committed by now
    round    binary   drafted ids that follow a position, and a digest of all ids before it
    reply    binary   how many of them are committed, and what follows them

A digest is chained over the committed ids, so that a position and its digest name the whole text before it. A
round that comes twice, late, or after a cut is answered from what is committed: it is computed once.

The words are those of the session, proposal and digest chain of
https://datatracker.ietf.org/doc/draft-li-mlc-inference-acceleration.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from models.base.errors import NestlingError

PROTOCOL = 1
MAX_FRAME = 64 * 1024
MAX_GAMMA = 64
"""The most drafted ids of a round."""
DIGEST_BYTES = 8
START = bytes(DIGEST_BYTES)
"""The digest of no ids."""
RUNS, EOS, LENGTH = 0, 1, 2
"""Whether and why a text is at its end."""

_ROUND = struct.Struct("<BIIQB")
_REPLY = struct.Struct("<BIIBBIQB")
_ROUND_KIND, _REPLY_KIND = 1, 2


class WireError(NestlingError):
    """A message that is none."""


class Round(NamedTuple):
    """Drafted ids."""

    number: int
    base: int
    """Number of ids before them, the prompt's included."""
    digest: bytes
    """Of those ids."""
    ids: Sequence[int]

    def pack(self) -> bytes:
        """Return the bytes: 18, and 4 for each id."""
        digest = int.from_bytes(self.digest, "little")
        head = _ROUND.pack(_ROUND_KIND, self.number, self.base, digest, len(self.ids))
        return head + struct.pack(f"<{len(self.ids)}I", *self.ids)

    @staticmethod
    def unpack(frame: bytes) -> "Round":
        """Return the message of a frame.

        Raises:
            WireError: if it is none.

        >>> Round.unpack(Round(1, 7, bytes(8), [3, 4]).pack()).ids
        [3, 4]
        """
        if len(frame) < _ROUND.size:
            raise WireError(f"frame: {len(frame)} bytes are no round")
        kind, number, base, digest, count = _ROUND.unpack_from(frame)
        if kind != _ROUND_KIND or count > MAX_GAMMA or len(frame) != _ROUND.size + 4 * count:
            raise WireError("frame: this is no round")
        ids = list(struct.unpack_from(f"<{count}I", frame, _ROUND.size))
        return Round(number, base, digest.to_bytes(DIGEST_BYTES, "little"), ids)


class Reply(NamedTuple):
    """What became of a round."""

    number: int
    base: int
    accepted: int
    """How many of its ids are committed."""
    finish: int
    """`RUNS`, `EOS` or `LENGTH`."""
    length: int
    """Number of committed ids."""
    digest: bytes
    """Of all of them."""
    ids: Sequence[int]
    """Committed ids after the accepted ones: none if the round does not follow what is committed."""

    def pack(self) -> bytes:
        """Return the bytes: 24, and 4 for each id."""
        digest = int.from_bytes(self.digest, "little")
        head = _REPLY.pack(
            _REPLY_KIND,
            self.number,
            self.base,
            self.accepted,
            self.finish,
            self.length,
            digest,
            len(self.ids),
        )
        return head + struct.pack(f"<{len(self.ids)}I", *self.ids)

    @staticmethod
    def unpack(frame: bytes) -> "Reply":
        """Return the message of a frame.

        Raises:
            WireError: if it is none.
        """
        if len(frame) < _REPLY.size or frame[0] != _REPLY_KIND or (len(frame) - _REPLY.size) % 4:
            raise WireError("the server sent what is no reply")
        _, number, base, accepted, finish, length, digest, count = _REPLY.unpack_from(frame)
        if len(frame) != _REPLY.size + 4 * count:
            raise WireError("the server sent a reply that is not whole")
        ids = list(struct.unpack_from(f"<{count}I", frame, _REPLY.size))
        return Reply(number, base, accepted, finish, length, digest.to_bytes(DIGEST_BYTES, "little"), ids)


class Chain:
    """The digests of a text that grows: one for each number of ids.

    >>> Chain([1, 2]).digests[-1] == Chain([2, 1]).digests[-1]
    False
    """

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.digests = [START]
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids."""
        for token in ids:
            self.add(token.to_bytes(4, "little"))

    def add(self, block: bytes) -> None:
        """Append what stands at the next position, in bytes."""
        digest = hashlib.blake2b(self.digests[-1] + block, digest_size=DIGEST_BYTES)
        self.digests.append(digest.digest())

    def cut(self, length: int) -> None:
        """Forget all but the first ids."""
        del self.digests[length + 1 :]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a hash of all that makes ids of text."""
    return hashlib.sha256(tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest()[:32]
