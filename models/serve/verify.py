"""The server's side of split decoding: sessions, whose drafts come over a WebSocket and are verified here.

The token at a position is the target's own choice under noise that is a function of the seed and the position
alone (`Coupled` in models/decode/sampling/samplers.py). A draft can only agree with it or not: whatever a
device sends, the text is that of one machine.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, WebSocket

from models.base.errors import NestlingError, UsageError
from models.decode.decoder import Decoder
from models.decode.engine.engine import Token, commit, prefill, score
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.policy import Fixed
from models.decode.engine.request import DecodingRequest, new_request, num_new_tokens
from models.decode.engine.scheduler import Steps
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.decode.sampling.samplers import COUPLED, Proposal
from models.serve.prefixes import Prefixes, Text
from models.serve.protocol import (
    EOS,
    LENGTH,
    MAX_FRAME,
    MAX_GAMMA,
    PROTOCOL,
    RUNS,
    Chain,
    Reply,
    Round,
    WireError,
    tokenizer_digest,
)
from models.serve.schema import OpenRequest
from models.serve.sockets import Session, Sessions, converse
from models.serve.worker import Task, Worker

MAX_REPLAY = 200
"""The most ids of a reply."""


@dataclass(eq=False, kw_only=True)
class Draft(Session):
    """A text that devices draft."""

    num_prompt: int
    request: DecodingRequest
    chain: Chain
    end: int
    """The most ids of the text."""
    finish: int = RUNS
    text: Text | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def ids(self) -> list[int]:
        """All committed ids, the prompt's first."""
        return self.request.state.ids

    def refresh(self) -> None:
        """Learn what was committed since the last time."""
        self.chain.extend(self.ids[len(self.chain.digests) - 1 :])
        if len(self.ids) > self.num_prompt and self.ids[-1] in self.request.eos_token_ids:
            self.finish = EOS
        elif len(self.ids) >= self.end:
            self.finish = LENGTH


class Verifier:
    """The sessions of a server.

    Args:
        decoder: the target.
        worker: runs the passes.
    """

    def __init__(self, decoder: Decoder, worker: Worker) -> None:
        self._decoder, self._worker = decoder, worker
        self._tokenizer = tokenizer_digest(decoder.tokenizer)
        self.sessions = Sessions[Draft](self._free)

    async def open(self, asked: OpenRequest, owner: object) -> Draft:
        """Return the session that was asked for, or a new one that has read all ids.

        Raises:
            NestlingError: naming what differs between client and server.
        """
        self._check(asked)
        known = self.sessions.find(asked.session)
        if known is not None and known.ids[: known.num_prompt] == asked.prompt_ids:
            known.owner = owner
            return known
        self.sessions.check_room()
        session = await self._run(lambda texts: self._begin(asked, texts))
        assert isinstance(session, Draft)
        session.owner = owner
        self.sessions[session.id] = session
        return session

    async def verify(self, session: Draft, asked: Round) -> Reply:
        """Return what becomes of a round; one that was answered before is not computed again."""
        vocab_size = self._decoder.folder.model.config.vocab_size
        if any(token >= vocab_size for token in asked.ids):
            raise WireError(f"ids: a token is not below {vocab_size}")
        async with session.lock:
            session.refresh()  # a round whose client left while it ran
            length, base = len(session.ids), asked.base
            if not session.num_prompt <= base <= length or session.chain.digests[base] != asked.digest:
                return self._reply(session, asked, follows=False)
            committed = session.ids[base:]
            overlap = min(len(committed), len(asked.ids))
            is_new = committed == list(asked.ids[:overlap]) and len(asked.ids) >= len(committed)
            if is_new and session.finish == RUNS:
                drafted = list(asked.ids[len(committed) :])
                await self._run(lambda _: _verify(session, drafted))
                session.refresh()
            return self._reply(session, asked, follows=True)

    def _free(self, session: Draft) -> None:
        if session.text is not None:
            session.text.is_live = False  # others may still copy its beginning
        self._worker.wake()

    def _check(self, asked: OpenRequest) -> None:
        ours = {
            "protocol": PROTOCOL,
            "tokenizer": self._tokenizer,
            "vocab_size": self._decoder.folder.model.config.vocab_size,
        }
        for name, value in ours.items():
            if getattr(asked, name) != value:
                raise UsageError(f"{name}: the client has {getattr(asked, name)}, the server {value}")
        size = self._decoder.folder.model.config.vocab_size
        if any(not 0 <= token < size for token in (*asked.prompt_ids, *asked.committed_ids)):
            raise UsageError(f"prompt_ids: a token is not from 0 to {size - 1}")

    def _begin(self, asked: OpenRequest, texts: Prefixes) -> Steps[Draft]:
        """Make room, and read the prompt and what is committed; in the worker's thread."""
        model, ids = self._decoder.folder.model, [*asked.prompt_ids, *asked.committed_ids]
        config = GenerationConfig(
            params=SamplingParams(**{name: getattr(asked, name) for name in _PARAMS}),
            verifier=COUPLED,
            max_new_tokens=asked.max_tokens,
            eos_token_ids=asked.eos_token_ids,
            seed=asked.seed,
        )
        end = len(asked.prompt_ids) + num_new_tokens(model, len(asked.prompt_ids), config)
        if len(ids) >= end:
            raise UsageError("committed_ids: there is nothing left to write")
        if not texts.make_room(end * model.new_cache(1).num_bytes):
            raise NestlingError("busy: no memory is left for keys and values; come back later")
        cache = model.new_cache(end)
        texts.fill(cache, model.key, ids)
        request = new_request(
            model,
            ids,
            Fixed(None, 0),
            SeededRandom(asked.seed),
            config,
            cache=cache,
            prefill_chunk=self._worker.limits.prefill_chunk,
        )
        text = Text(model.key, request.state, len(ids))
        texts.add(text)
        try:
            yield from prefill(request)
        except BaseException:
            text.is_live = False
            raise
        session = Draft(num_prompt=len(asked.prompt_ids), request=request, chain=Chain(), end=end, text=text)
        session.refresh()
        return session

    async def _run(self, start: Any) -> Any:
        """Run steps in the worker; raise what they raise."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any) -> None:
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        self._worker.run(Task(start=start, done=done))
        return await asyncio.shield(future)  # what was begun is taken, whoever has gone

    def _reply(self, session: Draft, asked: Round, *, follows: bool) -> Reply:
        length, base = len(session.ids), asked.base
        committed = session.ids[base : base + len(asked.ids) + MAX_REPLAY] if follows else []
        accepted = 0
        for ours, theirs in zip(committed, asked.ids, strict=False):
            if ours != theirs:
                break
            accepted += 1
        digest = session.chain.digests[length]
        rest = committed[accepted : accepted + MAX_REPLAY]
        return Reply(asked.number, base, accepted, session.finish, length, digest, rest)


_PARAMS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def _verify(session: Draft, drafted: list[int]) -> Steps[list[Token]]:
    """Score drafted ids and commit what is the target's own choice, which is one more at most."""
    request = session.request
    proposal = Proposal(request.state.ids, drafted[: session.end - len(request.state.ids) - 1])
    logits_TV = yield from score(request, proposal)
    return commit(request, request.sampler.verify(logits_TV, proposal), logits_TV)


def add_verification(app: FastAPI, verifier: Verifier) -> None:
    """Add the WebSocket that devices speak to."""

    @app.websocket("/v1/verify")
    async def verify(socket: WebSocket) -> None:
        async def start(text: str) -> tuple[Draft, Mapping[str, Any]]:
            session = await verifier.open(OpenRequest.parse(text), socket)
            return session, {
                "session": session.id,
                "gamma": MAX_GAMMA,
                "committed_ids": session.ids[session.num_prompt :],
                "finish": session.finish,
                "end": session.end,
            }

        async def answer(session: Draft, frame: bytes) -> bytes:
            return (await verifier.verify(session, Round.unpack(frame))).pack()

        await converse(socket, verifier.sessions, start, answer, MAX_FRAME)
