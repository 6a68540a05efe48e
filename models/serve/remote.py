"""The device's side of split decoding: a member drafts here, the full model verifies over a WebSocket.

    draft     blocks of tokens, each after the one before, as if all of them were kept
    send      up to `window` blocks before the first reply is here, so that the round trip is hidden
    reply     what is committed; where it differs from what was drafted, the rest is drafted again from there
    resume    after a cut the session goes on, or any server of the model begins one with the committed ids

The noise of a position is a function of the seed and the position alone, on both sides: the text is that of
one machine, whatever is lost, repeated or restarted.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import ClassVar, NamedTuple

from tokenizers import Tokenizer
from websockets.sync.client import ClientConnection

from models.base.errors import NestlingError, UsageError
from models.decode.engine.draft import propose
from models.decode.engine.engine import Committed, Stream, Token
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.policy import Round as Outcome
from models.decode.engine.report import Report
from models.decode.engine.scheduler import run_steps
from models.decode.engine.state import State
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import COUPLED, make_sampler
from models.elastic.cache import KVCache
from models.elastic.view import Model
from models.serve.peer import LOST, Lost, Patience, Peer, ask, checked
from models.serve.protocol import (
    EOS,
    MAX_FRAME,
    MAX_GAMMA,
    PROTOCOL,
    RUNS,
    Chain,
    Reply,
    Round,
    tokenizer_digest,
)

MAX_WINDOW = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Remote(Peer):
    """The server that verifies, and how much is drafted for it."""

    flag: ClassVar[str] = "--remote"
    command: ClassVar[str] = "serve --verify"
    gamma: int = 4
    """Drafted tokens of a block."""
    window: int = 2
    """Blocks that are sent before the first reply is here; 1 waits for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value, least, most in (
            ("--gamma", self.gamma, 0, MAX_GAMMA),
            ("--window", self.window, 1, MAX_WINDOW),
        ):
            if not least <= value <= most:
                raise UsageError(f"{flag} must be from {least} to {most} with --remote, got {value}")


def stream_remote(
    remote: Remote,
    member: Model,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    config: GenerationConfig,
) -> Stream:
    """Continue a prompt with drafts of a member and verification elsewhere.

    Raises:
        NestlingError: if the server refuses, or is away for longer than the timeout.
    """
    report = Report()
    decoding = _Decoding(remote, member, tokenizer, prompt_ids, config, report)
    committed = decoding.run()
    return Stream(committed, report, committed.close)


class _Sent(NamedTuple):
    """A block on its way."""

    round: Round
    at: float
    draft_seconds: float


@dataclass
class _Link:
    """One connection, and the blocks on their way."""

    socket: ClientConnection
    timeout: float
    sent: deque[_Sent] = field(default_factory=deque)

    def send(self, block: _Sent) -> None:
        self.socket.send(block.round.pack())
        self.sent.append(block)

    def receive(self, *, wait: bool) -> Reply | None:
        """Return the next reply; None if there is none yet."""
        try:
            frame = self.socket.recv(self.timeout if wait else 0)
        except TimeoutError:
            if wait:
                raise
            return None
        if isinstance(frame, str):
            checked(frame)
        return Reply.unpack(frame) if isinstance(frame, bytes) else None


class _Decoding:
    """A text on the device: what is committed, and what is drafted beyond."""

    def __init__(
        self,
        remote: Remote,
        member: Model,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        config: GenerationConfig,
        report: Report,
    ) -> None:
        self._remote, self._member, self._config, self._report = remote, member, config, report
        self._tokenizer, self._num_prompt = tokenizer_digest(tokenizer), len(prompt_ids)
        self._sampler = make_sampler(config.params, SeededRandom(config.seed), COUPLED)
        self._ids = list(prompt_ids)  # the drafted ones on their way included
        self._chain = Chain(prompt_ids)  # of all of them
        self._num_committed = len(prompt_ids)
        self._number = self._epoch = 0
        self._session: str | None = None
        self._finish, self._end = RUNS, 0
        self._cache: KVCache | None = None
        self._started = perf_counter()

    def run(self) -> Generator[Committed, None, None]:
        """Yield tokens as they are committed."""
        patience = Patience(self._remote)
        while True:
            try:
                with self._remote.connect("/v1/verify", MAX_FRAME * 16) as socket:
                    for committed in self._talk(_Link(socket, self._remote.timeout)):
                        yield committed
                        patience.reset()
                return
            except LOST as error:
                if patience.is_new and self._num_committed == self._num_prompt:
                    _log.warning("no server answers at %s yet; trying again", self._remote.url)
                patience.wait(error)

    def _talk(self, link: _Link) -> Iterator[Committed]:
        """Go on with the text over one connection, up to its end."""
        yield from self._open(link)
        while self._finish == RUNS:
            may_send = len(link.sent) < self._remote.window and (self._room > 0 or not link.sent)
            if may_send:
                link.send(self._draft())
            reply = link.receive(wait=not may_send or self._room <= 0)
            if reply is not None:
                yield from self._take(link.sent.popleft(), reply)
        with contextlib.suppress(*LOST):
            link.socket.send("bye")

    @property
    def _room(self) -> int:
        """How many tokens may be drafted: the last one is the target's."""
        return self._end - len(self._ids) - 1

    def _open(self, link: _Link) -> Iterator[Committed]:
        params = asdict(self._config.params)
        ends = self._config.end_tokens
        answer = ask(
            link.socket,
            {
                "protocol": PROTOCOL,
                "tokenizer": self._tokenizer,
                "vocab_size": self._member.full.config.vocab_size,
                "session": self._session,
                "prompt_ids": self._ids[: self._num_prompt],
                "committed_ids": self._ids[self._num_prompt : self._num_committed],
                "max_tokens": self._config.max_new_tokens,
                "seed": self._config.seed,
                "eos_token_ids": None if ends is None else list(ends),
                **params,
            },
            self._remote.timeout,
        )
        self._session, self._end, finish = answer["session"], answer["end"], answer["finish"]
        ids = [*self._ids[: self._num_prompt], *answer["committed_ids"]]
        self._report.prefill_seconds = self._report.prefill_seconds or perf_counter() - self._started
        self._cut(self._num_committed)  # what was on its way is drafted again
        yield from self._commit(ids, finish, base=len(ids), accepted=0)

    def _draft(self) -> _Sent:
        """Draft a block after all that is drafted, as if it were kept."""
        started, base = perf_counter(), len(self._ids)
        gamma = min(self._remote.gamma, self._room)
        drafted: list[int] = []
        if gamma > 0:
            if self._cache is None:
                self._cache = self._member.full.new_cache(self._end)
            self._cache.rewind(min(self._cache.length, base - 1))  # the last token is always read
            state = State(list(self._ids), self._cache)
            drafted = run_steps(propose(self._member, state, self._cache, gamma, self._sampler)).ids
        block = Round(self._number, base, self._chain.digests[base], drafted)
        self._number += 1
        self._ids += drafted
        self._chain.extend(drafted)
        return _Sent(block, perf_counter(), perf_counter() - started)

    def _take(self, sent: _Sent, reply: Reply) -> Iterator[Committed]:
        if reply.number != sent.round.number:
            raise Lost("a reply is missing")
        if reply.number < self._epoch:
            return
        if not reply.accepted and not reply.ids and reply.finish == RUNS:
            self._session = None  # it has another text, or none
            raise Lost("the server's text is another one")
        base, now = sent.round.base, perf_counter()
        self._report.count_round(
            Outcome("remote", len(sent.round.ids), reply.accepted, sent.draft_seconds, now - sent.at)
        )
        self._report.decode_seconds = now - self._started - self._report.prefill_seconds
        ids = [*self._ids[:base], *sent.round.ids[: reply.accepted], *reply.ids]
        finish = reply.finish if len(ids) >= reply.length else RUNS
        yield from self._commit(ids, finish, base=base, accepted=reply.accepted)

    def _commit(self, ids: list[int], finish: int, *, base: int, accepted: int) -> Iterator[Committed]:
        """Take over what is committed now; drop what was drafted otherwise."""
        known = self._num_committed
        if ids[:known] != self._ids[:known]:
            raise NestlingError(
                f"--remote {self._remote.url}: the server has another text than it had before"
            )
        same = _num_common(self._ids, ids)
        if same < min(len(ids), len(self._ids)):
            self._cut(same)
            self._epoch = self._number
        self._ids += ids[len(self._ids) :]
        self._chain.extend(self._ids[len(self._chain.digests) - 1 :])
        self._num_committed, self._finish = len(ids), finish
        for position in range(known, len(ids)):
            drafted = base <= position < base + accepted
            is_last = position == len(ids) - 1
            reason = "" if finish == RUNS or not is_last else "eos" if finish == EOS else "length"
            yield Committed(Token(ids[position], drafted), position - base, reason)

    def _cut(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        del self._ids[length:]
        self._chain.cut(length)
        if self._cache is not None:
            self._cache.rewind(min(self._cache.length, length))


def _num_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
