"""Messages between a client and the stages of a model: states of the residual stream, and nothing of a text.

    open      JSON     positions of the text, and perhaps a session to go on with
    opened    JSON     what the stage is: its layers, hashes of the weights, dtype, the model's final norm
    pass      binary   states [T, D] that enter the layers after a position, and a digest of all before
    states    binary   what leaves the layers of the last of them, and the digest with them
    lacks     binary   how many positions the stage holds; the client sends all inputs again

States are fp32, little endian, whatever the weights: a compiled pass keeps its residual stream in fp32, and
in bf16 texts would differ from those of one machine. A digest is chained over the rows that entered: a
position and its digest name all that the keys and values were made of, so that a pass may come twice, late
or after a cut.
"""

import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.serve.protocol import DIGEST_BYTES, WireError

PROTOCOL = 1
STATES = "float32"
MAX_ROWS = 256
"""The most positions of a pass."""
ROW_BYTES = 4
"""Of a number of a state."""
_FP32 = 1
_PASS_KIND, _STATES_KIND, _LACKS_KIND = 3, 4, 5
_PASS = struct.Struct("<BBIIHHQ")
_STATES = struct.Struct("<BBIIHQ")
_LACKS = struct.Struct("<BII")


class StagePass(NamedTuple):
    """States that enter the layers of a stage."""

    number: int
    base: int
    """Number of positions before them."""
    digest: bytes
    """Of the rows at those."""
    num_last: int
    """Number of last positions whose states are asked for."""
    rows: bytes

    def pack(self, hidden_size: int) -> bytes:
        """Return the bytes: 22, and four for each number."""
        count = len(self.rows) // (ROW_BYTES * hidden_size)
        digest = int.from_bytes(self.digest, "little")
        return _PASS.pack(_PASS_KIND, _FP32, self.number, self.base, count, self.num_last, digest) + self.rows

    @staticmethod
    def unpack(frame: bytes, hidden_size: int) -> "StagePass":
        """Return the message of a frame.

        Raises:
            WireError: if it is none.

        >>> one = StagePass(1, 7, bytes(8), 1, bytes(16))
        >>> StagePass.unpack(one.pack(2), 2) == one
        True
        """
        if len(frame) < _PASS.size:
            raise WireError(f"frame: {len(frame)} bytes are no pass")
        kind, dtype, number, base, count, num_last, digest = _PASS.unpack_from(frame)
        if kind != _PASS_KIND:
            raise WireError("frame: this is no pass")
        if dtype != _FP32:
            raise WireError(f"dtype: states must be {STATES}, which is {_FP32}, got {dtype}")
        if not 1 <= count <= MAX_ROWS or num_last > count:
            raise WireError(f"rows: from 1 to {MAX_ROWS}, and no more asked for, got {count} and {num_last}")
        if len(frame) != _PASS.size + ROW_BYTES * hidden_size * count:
            raise WireError(f"frame: {len(frame)} bytes are not {count} states of {hidden_size} numbers")
        return StagePass(number, base, digest.to_bytes(DIGEST_BYTES, "little"), num_last, frame[_PASS.size :])


class States(NamedTuple):
    """States that leave the layers of a stage."""

    number: int
    base: int
    """Number of positions before the pass that they answer."""
    digest: bytes
    """Of all rows that the stage has with that pass."""
    rows: bytes

    def pack(self, hidden_size: int) -> bytes:
        """Return the bytes: 20, and four for each number."""
        count, digest = len(self.rows) // (ROW_BYTES * hidden_size), int.from_bytes(self.digest, "little")
        return _STATES.pack(_STATES_KIND, _FP32, self.number, self.base, count, digest) + self.rows


class Lacks(NamedTuple):
    """The stage does not hold what a pass follows."""

    number: int
    length: int
    """Number of positions that it holds."""

    def pack(self) -> bytes:
        """Return the bytes: 9."""
        return _LACKS.pack(_LACKS_KIND, self.number, self.length)


def unpack_answer(frame: bytes, hidden_size: int) -> States | Lacks:
    """Return the message of a stage's frame.

    Raises:
        WireError: if it is none.
    """
    if len(frame) == _LACKS.size and frame[0] == _LACKS_KIND:
        return Lacks(*_LACKS.unpack(frame)[1:])
    if len(frame) < _STATES.size or frame[0] != _STATES_KIND or frame[1] != _FP32:
        raise WireError("the stage sent what is no answer")
    _, _, number, base, count, digest = _STATES.unpack_from(frame)
    if len(frame) != _STATES.size + ROW_BYTES * hidden_size * count:
        raise WireError("the stage sent an answer that is not whole")
    return States(number, base, digest.to_bytes(DIGEST_BYTES, "little"), frame[_STATES.size :])


def max_frame(hidden_size: int) -> int:
    """Return bytes of the longest frame."""
    return _PASS.size + ROW_BYTES * hidden_size * MAX_ROWS


def rows_of(x_TD: Tensor) -> bytes:
    """Return states in the wire's bytes."""
    return x_TD.detach().cpu().numpy().astype("<f4", copy=False).tobytes()


def states_of(rows: bytes, hidden_size: int) -> Tensor:
    """Return states [T, D] from the wire's bytes; the inverse of `rows_of`.

    >>> bool((states_of(rows_of(torch.ones(3, 2)), 2) == 1).all())
    True
    """
    return torch.from_numpy(np.frombuffer(rows, "<f4").astype(np.float32).reshape(-1, hidden_size))
