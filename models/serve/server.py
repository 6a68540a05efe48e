"""A server from a decoder: OpenAI's routes for many clients, and drafts from devices if it verifies them."""

import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import time

from models.base.processor import free_memory_bytes
from models.decode.decoder import Decoder
from models.serve.app import Service, make_app
from models.serve.listen import Address, Listener
from models.serve.load import tokens_within
from models.serve.metrics import Metrics
from models.serve.protocol import MAX_FRAME
from models.serve.served import default_name, serve_family
from models.serve.verify import Verifier, add_verification
from models.serve.worker import Limits, Worker

CHUNK_SECONDS = 0.05
"""What a pass may take longer because it reads some of a prompt."""


def serve(
    decoder: Decoder,
    *,
    name: str | None = None,
    address: Address | None = None,
    limits: Limits | None = None,
    verifies: bool = False,
    on_ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve a model and its family as `nestling serve` does, until a signal comes.

    Args:
        decoder: the model and its draft, as `open_decoder` opens them.
        name: that clients use; None is the run's.
        address: where it listens; None is port 8000 of this machine.
        limits: bounds; None are the usual ones, and a quarter of the free memory for keys and values.
        verifies: whether devices may send drafts.
        on_ready: called with the URL once it answers.

    Raises:
        NestlingError: if nothing can listen there.
    """
    limits = limits or Limits(kv_bytes=free_memory_bytes() // 4)
    name = name or default_name(decoder)
    Server(decoder, name, address or Address(), limits, on_ready, verifies=verifies).run()


class Server(Listener):
    """A server of one model folder; `run` returns once it was stopped and its texts are finished.

    Args:
        decoder: the model and its draft.
        name: that clients use.
        address: where it listens.
        limits: bounds.
        verifies: whether devices may send drafts (models/serve/verify.py).
        on_ready: called with the URL once it answers.
    """

    def __init__(
        self,
        decoder: Decoder,
        name: str,
        address: Address,
        limits: Limits,
        on_ready: Callable[[str], None] = lambda _: None,
        *,
        verifies: bool = False,
    ) -> None:
        self.metrics = Metrics(kv_budget=limits.kv_bytes)
        self.models, load = serve_family(decoder, name)
        chunk = tokens_within(decoder.folder.model, CHUNK_SECONDS)
        limits = replace(limits, prefill_chunk=min(limits.prefill_chunk, chunk))
        self.worker = Worker(limits, self._post, self.metrics, load)
        vocabulary = decoder.tokenizer.get_vocab() or [""]
        service = Service(
            decoder=decoder,
            models=self.models,
            worker=self.worker,
            metrics=self.metrics,
            created=int(time()),
            longest_token=max(len(token.encode("utf-8", "surrogatepass")) for token in vocabulary),
        )
        routes = make_app(service)
        self.verifier = Verifier(decoder, self.worker) if verifies else None
        if self.verifier is not None:
            add_verification(routes, self.verifier)
        # an `open` holds the prompt
        super().__init__(routes, self.metrics, address, on_ready, MAX_FRAME * 16 if verifies else None)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """See `Listener`."""
        self.worker.start()
        try:
            super().run(sockets)
        finally:
            self.worker.stop()

    def _post(self, calls: Sequence[Callable[[], None]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            if self.loop is not None:
                self.loop.call_soon_threadsafe(_make, calls)


def _make(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
