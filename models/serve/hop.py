"""A text's connection to a stage of a model, which outlives the stage: all that entered it is kept here.

lost       the next address is asked, the stage's own or that of one that stands in for it
resumed    a stage that still has the text goes on with it
replaced   any other says that it lacks what a pass follows, and is sent everything again
"""

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from websockets.sync.client import ClientConnection

from models.base.errors import NestlingError, UsageError
from models.serve.peer import LOOPBACK, LOST, Lost, Patience, Peer, ask, checked
from models.serve.protocol import Chain, WireError
from models.serve.states import (
    MAX_ROWS,
    PROTOCOL,
    ROW_BYTES,
    Lacks,
    StagePass,
    States,
    max_frame,
    rows_of,
    states_of,
    unpack_answer,
)

AHEAD = 4
"""Passes of a long prompt that are sent before the first answer is here, so that its round trip is hidden."""
MOST_FACTS = 2**20
"""Bytes of a stage's first answer."""


@dataclass(frozen=True, kw_only=True)
class StagePeer(Peer):
    """A stage's address."""

    flag: ClassVar[str] = "--stages"
    command: ClassVar[str] = "stage"

    @staticmethod
    def parse(text: str, **settings: Any) -> "StagePeer":
        """Return the address of a text.

        Args:
            text: a URL, or HOST:PORT, which is encrypted unless it is loopback.
            settings: other fields.

        Raises:
            UsageError: if it is none.

        >>> StagePeer.parse("127.0.0.1:8001").url, StagePeer.parse("stage.example:8001").url
        ('ws://127.0.0.1:8001', 'wss://stage.example:8001')
        """
        text = text.strip()
        if "://" not in text:
            host, _, port = text.rpartition(":")
            if not host or not port.isdigit():
                raise UsageError(f"--stages {text} is no address; give one as in HOST:PORT")
            text = f"{'ws' if host.strip('[]') in LOOPBACK else 'wss'}://{text}"
        return StagePeer(url=text, **settings)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a stage says about itself."""

    layers: tuple[int, int]
    num_layers: int
    hidden_size: int
    context: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    states: str
    weights: str
    ends: str
    tokenizer: str
    norm: str

    @staticmethod
    def parse(fields: Mapping[str, Any], url: str) -> "Facts":
        """Return them; refuse what cannot be."""
        kinds = {"layers": list, "eos_token_ids": list}
        numbers = ("num_layers", "hidden_size", "context")
        kinds |= dict.fromkeys(numbers, int)  # type: ignore[arg-type]
        kinds |= dict.fromkeys(("dtype", "states", "weights", "ends", "tokenizer", "norm"), str)  # type: ignore[arg-type]
        if fields.get("protocol") != PROTOCOL:
            raise NestlingError(
                f"--stages {url}: protocol: the client has {PROTOCOL}, the stage {fields.get('protocol')}"
            )
        for name, kind in kinds.items():
            if not isinstance(fields.get(name), kind):
                raise NestlingError(f"--stages {url}: {name} is missing in its answer; is it a stage?")
        layers, ends = fields["layers"], fields["eos_token_ids"]
        all_numbers = [*layers, *ends, *(fields[name] for name in numbers)]
        if len(layers) != 2 or not all(type(one) is int and 0 <= one < 2**31 for one in all_numbers):
            raise NestlingError(f"--stages {url}: its answer names no layers; is it a stage?")
        known = {name: fields[name] for name in kinds}
        return Facts(**known | {"layers": tuple(layers), "eos_token_ids": tuple(ends)})


@dataclass(frozen=True, kw_only=True)
class StageRoute:
    """A stage, and who stands in for it."""

    facts: Facts
    peers: Sequence[StagePeer]


def describe(peer: StagePeer) -> Facts:
    """Ask a stage what it is.

    Raises:
        NestlingError: if it refuses, is no stage, or is away for longer than the timeout.
    """
    patience = Patience(peer)
    while True:
        try:
            with peer.connect("/v1/stage", MOST_FACTS) as socket:
                return Facts.parse(ask(socket, {"protocol": PROTOCOL}, peer.timeout), peer.url)
        except LOST as error:
            patience.wait(error)


class _Sent(NamedTuple):
    """A pass on its way."""

    number: int
    start: int
    stop: int
    num_last: int


class Hop:
    """A text's connection to a stage, or to one that stands in for it.

    Args:
        route: the stage.
        num_positions: the most positions of the text.
    """

    def __init__(self, route: StageRoute, num_positions: int) -> None:
        self._route, self._num_positions = route, num_positions
        self._size = route.facts.hidden_size
        self._entered = bytearray()  # all states that entered, as they are sent
        self._chain = Chain()
        self._connection = contextlib.ExitStack()
        self._socket: ClientConnection | None = None
        self._session: str | None = None
        self._number = self._turn = 0
        self._has_answered = False

    def run(self, x_TD: Tensor, base: int, num_last: int) -> Tensor:
        """Return what leaves the stage's layers [num_last, D] where `x_TD` enters after `base` positions.

        Raises:
            NestlingError: if the stage refuses, or is away for longer than the timeout.
        """
        self._keep(rows_of(x_TD), base)
        patience = Patience(self._peer)
        while True:
            try:
                return self._ask(base, base + len(x_TD), num_last)
            except LOST as error:
                self._drop()
                patience.wait(error)

    @property
    def _peer(self) -> StagePeer:
        return self._route.peers[self._turn % len(self._route.peers)]

    @property
    def _row(self) -> int:
        return ROW_BYTES * self._size

    def _keep(self, rows: bytes, base: int) -> None:
        del self._entered[base * self._row :]
        self._chain.cut(base)
        self._entered += rows
        for place in range(0, len(rows), self._row):
            self._chain.add(rows[place : place + self._row])

    def _ask(self, base: int, end: int, num_last: int) -> Tensor:
        """Send the states from `base` to `end`; before them all others, to a stage that lacks them."""
        socket = self._socket = self._socket or self._open()
        rows = self._send(socket, base, end, num_last)
        if rows is None:
            rows = self._send(socket, 0, end, num_last)
        if rows is None:
            raise NestlingError(f"--stages {self._peer.url}: the stage forgets what it is sent")
        return states_of(rows, self._size)

    def _open(self) -> ClientConnection:
        peer = self._peer
        longest = max(MOST_FACTS, max_frame(self._size))
        socket = self._connection.enter_context(peer.connect("/v1/stage", longest))
        asked = {"protocol": PROTOCOL, "session": self._session, "positions": self._num_positions}
        answer = ask(socket, asked, peer.timeout)
        if Facts.parse(answer, peer.url) != self._route.facts:
            raise NestlingError(f"--stages {peer.url}: the stage has another model than it had before")
        self._session = str(answer.get("session"))
        return socket

    def _send(self, socket: ClientConnection, base: int, end: int, num_last: int) -> bytes | None:
        """Return the rows of the last positions; None if the stage lacks what they follow."""
        sent, answers = deque[_Sent](), list[States | Lacks]()
        for start in range(base, end, MAX_ROWS):
            if len(sent) == AHEAD:
                answers.append(self._receive(socket, sent.popleft()))
            stop = min(start + MAX_ROWS, end)
            wanted = min(stop - start, max(0, stop - (end - num_last)))
            sent.append(self._send_pass(socket, start, stop, wanted))
        answers += [self._receive(socket, one) for one in sent]
        left = [one.rows for one in answers if isinstance(one, States)]
        return b"".join(left) if len(left) == len(answers) else None

    def _send_pass(self, socket: ClientConnection, start: int, stop: int, num_last: int) -> "_Sent":
        self._number += 1
        block = bytes(memoryview(self._entered)[start * self._row : stop * self._row])
        one = StagePass(self._number, start, self._chain.digests[start], num_last, block)
        socket.send(one.pack(self._size))
        return _Sent(self._number, start, stop, num_last)

    def _receive(self, socket: ClientConnection, sent: "_Sent") -> States | Lacks:
        frame = socket.recv(self._peer.timeout)
        if isinstance(frame, str):
            checked(frame)
            raise WireError(f"--stages {self._peer.url}: the stage sent what is no answer")
        answer = unpack_answer(frame, self._size)
        self._has_answered = True
        if answer.number != sent.number:
            raise Lost("an answer is missing")
        if isinstance(answer, States):
            right = answer.base == sent.start and answer.digest == self._chain.digests[sent.stop]
            if not right or len(answer.rows) != sent.num_last * self._row:
                raise NestlingError(
                    f"--stages {self._peer.url}: the stage answers another pass than was asked"
                )
        return answer

    def _drop(self) -> None:
        """Give the connection up; the next one is to the same stage, unless it did not answer at all."""
        self._socket = None
        self._turn += not self._has_answered
        self._has_answered = False
        self._connection.close()

    def close(self) -> None:
        """Free what the stage keeps of the text."""
        socket, self._socket = self._socket, None
        with contextlib.suppress(*LOST), self._connection:
            if socket is not None:
                socket.send("bye")
