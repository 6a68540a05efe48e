"""A stage: some layers of a model, for clients who have its ends and write texts with several stages.

A stage sees states of the residual stream, never a token. It keeps the keys and values of its layers for each
text, and what the client sends names the position that it follows: what a draft got wrong is overwritten, a
pass that comes twice gives the same bits, and a client that finds less here than it needs sends it all again.
"""

import asyncio
import base64
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, WebSocket
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.base.processor import free_memory_bytes
from models.checkpoint.weights import hash_family
from models.decode.open import open_layers
from models.elastic.cache import KVCache
from models.elastic.count import count_kv_bytes
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.kernels.blocks import BlockTensor
from models.serve.listen import Address, Listener
from models.serve.metrics import Metrics
from models.serve.protocol import Chain, WireError, tokenizer_digest
from models.serve.schema import OpenStage
from models.serve.sockets import Session, Sessions, converse
from models.serve.states import (
    PROTOCOL,
    STATES,
    Lacks,
    StagePass,
    States,
    max_frame,
    rows_of,
    states_of,
)

HASH_LETTERS = 32


def serve_stage(
    path: str | Path,
    layers: str,
    *,
    dtype: str = "auto",
    address: Address | None = None,
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Run some layers of a model as `nestling stage` does, until a signal comes.

    Args:
        path: the model folder.
        layers: consecutive ones, as 0-3.
        dtype: as `open_for_decoding` takes it.
        address: where it listens; None is port 8000 of this machine.
        on_ready: called with the URL once it answers.

    Raises:
        NestlingError: if there are no such layers, or nothing can listen there.
    """
    StageServer(open_stage(path, layers, dtype), address or Address(), on_ready=on_ready).run()


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """Some layers of a model folder, ready to run."""

    layers: ElasticLM
    """The layers as a model, whose ends nothing reads."""
    facts: Mapping[str, Any]
    """What clients compare with what they have."""


def open_stage(path: str | Path, layers: str, dtype: str = "auto") -> StageModel:
    """Open some layers of a model folder.

    Args:
        path: the model folder.
        layers: consecutive ones, as 0-3.
        dtype: as `open_for_decoding` takes it.

    Raises:
        UsageError: if there are no such layers, or no folder.
        NestlingError: if it is damaged, or has no tokenizer.
    """
    first, last = parse_layers(layers)
    folder, dtype, num_layers = open_layers(path, first, last, dtype)
    if folder.tokenizer is None:
        raise NestlingError(f"{path} has no tokenizer.json; put the one it was trained with there")
    model, config = folder.model, folder.model.config
    norm = model.model.norm.weight.detach().float().cpu()
    facts = {
        "layers": [first, last],
        "num_layers": num_layers,
        "hidden_size": config.hidden_size,
        "context": config.max_position_embeddings,
        "eos_token_ids": list(config.eos_token_ids),
        "dtype": dtype,
        "states": STATES,
        "weights": _weights_digest(folder.path),
        "ends": ends_digest(model),
        "tokenizer": tokenizer_digest(folder.tokenizer),
        "norm": base64.b64encode(rows_of(norm)).decode(),
    }
    return StageModel(layers=model, facts=facts)


def parse_layers(text: str) -> tuple[int, int]:
    """Return the first and the last layer.

    Raises:
        UsageError: if the text names other than consecutive layers.

    >>> parse_layers("0-3"), parse_layers("4")
    ((0, 3), (4, 4))
    """
    try:
        layers = Granularity.parse(f"layers={text}").layers
    except UsageError:
        layers = None
    if not isinstance(layers, tuple) or layers[-1] - layers[0] != len(layers) - 1:
        raise UsageError(f"--layers {text} are no consecutive layers; write them as 0-3")
    return layers[0], layers[-1]


def ends_digest(model: ElasticLM) -> str:
    """Return a hash of the embedding and the head, which a client has, too."""
    digest = hashlib.sha256()
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        stored = weight.blocks_OBY if isinstance(weight, BlockTensor) else weight.detach()
        digest.update(stored.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:HASH_LETTERS]


def _weights_digest(path: Path) -> str:
    config = b"" if path.is_file() else (path / "config.json").read_bytes()
    return hashlib.sha256(config + hash_family(path).encode()).hexdigest()[:HASH_LETTERS]


@dataclass(eq=False, kw_only=True)
class StageText(Session):
    """What a stage keeps of a text."""

    cache: KVCache
    chain: Chain = field(default_factory=Chain)


class Stage:
    """Layers, and the texts of clients.

    Args:
        model: the layers.
        kv_bytes: the most memory of keys and values.
    """

    def __init__(self, model: StageModel, kv_bytes: int) -> None:
        self._model, self._layers, self._kv_bytes = model, model.layers, kv_bytes
        self.sessions = Sessions[StageText](lambda _: None)
        # torch's number of threads is each thread's own
        threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "nestling-stage", torch.set_num_threads, (threads,))

    @property
    def hidden_size(self) -> int:
        """Numbers of a state."""
        return self._layers.config.hidden_size

    def open(self, asked: OpenStage, owner: object) -> tuple[StageText | None, Mapping[str, Any]]:
        """Return the session that was asked for, or a new one; none for a client who only asks.

        Raises:
            NestlingError: naming what cannot be.
        """
        if asked.protocol != PROTOCOL:
            raise UsageError(f"protocol: the client has {asked.protocol}, the stage {PROTOCOL}")
        opened = {"protocol": PROTOCOL, **self._model.facts}
        if not asked.positions:
            return None, opened
        text = self.sessions.find(asked.session)
        if text is None or text.cache.num_positions != asked.positions:
            text = StageText(cache=self._new_cache(asked.positions))
            self.sessions[text.id] = text
        text.owner = owner
        return text, opened | {"session": text.id}

    def _new_cache(self, positions: int) -> KVCache:
        config = self._layers.config
        if positions > config.max_position_embeddings:
            raise UsageError(
                f"positions: {positions} are more than the context of {config.max_position_embeddings}"
            )
        each = count_kv_bytes(config, num_positions=1, dtype_bytes=self._layers.cache_dtype.itemsize)
        if positions * each > self._kv_bytes:
            raise UsageError(
                f"positions: {positions} are more than the stage's memory of keys and values holds, "
                f"{self._kv_bytes // each}; ask for fewer, or start it with more --kv-memory"
            )
        self.sessions.check_room()
        if positions * each + sum(one.cache.num_bytes for one in self.sessions.values()) > self._kv_bytes:
            raise NestlingError("busy: no memory is left for keys and values; come back later")
        return self._layers.new_cache(positions)

    async def answer(self, text: StageText, frame: bytes) -> bytes:
        """Return the answer to a pass.

        Raises:
            WireError: if the frame is no pass.
        """
        one = StagePass.unpack(frame, self.hidden_size)
        end = one.base + len(one.rows) // (4 * self.hidden_size)
        if end > text.cache.num_positions:
            raise WireError(f"base: the text has {text.cache.num_positions} positions, not {end}")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, text, one)

    @torch.inference_mode()
    def _run(self, text: StageText, one: StagePass) -> bytes:
        cache, chain = text.cache, text.chain
        if one.base > cache.length or chain.digests[one.base] != one.digest:
            return Lacks(one.number, cache.length).pack()
        x_TD = states_of(one.rows, self.hidden_size)
        if not bool(torch.isfinite(x_TD).all()):
            raise WireError("states: they hold what is no number")
        cache.rewind(one.base)
        chain.cut(one.base)
        y_TD: Tensor = self._layers.run_layers(x_TD, cache, max(1, one.num_last))
        cache.commit(len(x_TD))
        for x_D in x_TD:
            chain.add(rows_of(x_D))
        leaving = rows_of(y_TD) if one.num_last else b""
        return States(one.number, one.base, chain.digests[-1], leaving).pack(self.hidden_size)


class StageServer(Listener):
    """A server of a stage; `run` returns once it was stopped.

    Args:
        model: the layers.
        address: where it listens.
        kv_bytes: the most memory of keys and values; None is a quarter of what is free.
        on_ready: called with the URL once it answers.
    """

    def __init__(
        self,
        model: StageModel,
        address: Address,
        kv_bytes: int | None = None,
        on_ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.stage = Stage(model, free_memory_bytes() // 4 if kv_bytes is None else kv_bytes)
        app = FastAPI(title="nestling", docs_url=None, redoc_url=None, openapi_url=None)
        _add_stage(app, self.stage)
        super().__init__(app, Metrics(), address, on_ready, max_frame(self.stage.hidden_size))


def _add_stage(app: FastAPI, stage: Stage) -> None:
    @app.websocket("/v1/stage")
    async def speak(socket: WebSocket) -> None:
        async def start(text: str) -> tuple[StageText | None, Mapping[str, Any]]:
            return stage.open(OpenStage.parse(text), socket)

        await converse(socket, stage.sessions, start, stage.answer, max_frame(stage.hidden_size))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}
