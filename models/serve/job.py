"""A job: one text that the server writes for a client, and what is sent while it grows."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from models.base.errors import NestlingError
from models.decode.detokenize import Tokenizer
from models.decode.engine.engine import Token
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.logprobs import Logprobs
from models.decode.engine.policy import Policy
from models.decode.engine.report import Report
from models.decode.engine.request import num_new_tokens
from models.elastic.view import Model


@dataclass(frozen=True, kw_only=True)
class Update:
    """What has become known of a text since the last update."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str = ""
    """`stop` or `length`; empty while the text goes on."""
    error: Exception | None = None
    """The reason why it ends without a finish."""

    @property
    def is_last(self) -> bool:
        """True if nothing follows."""
        return bool(self.finish_reason) or self.error is not None


@dataclass(eq=False, kw_only=True)
class Job:
    """One text to write. Its updates come through `updates`, with its index, in the event loop that made it.

    Raises:
        UsageError: if the prompt leaves no room for a token.
    """

    target: Model
    tokenizer: Tokenizer
    new_policy: Callable[[], Policy]
    prompt_ids: list[int]
    config: GenerationConfig
    row: int = 0
    """Number of the choice, which makes random numbers of its own."""
    logprobs: int | None = None
    """How many likeliest tokens come with each token; None asks for no log-probabilities."""
    scores_prompt: bool = False
    """True if the prompt's own log-probabilities are asked for."""
    index: int = 0
    """Number among the choices of a response."""
    updates: "asyncio.Queue[tuple[int, Update]]" = field(default_factory=asyncio.Queue)
    """Shared by the choices of a response."""
    submitted: float = field(default_factory=perf_counter)
    num_shared: int = 0
    """Tokens of the prompt that were not read again."""
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        limit = num_new_tokens(self.target, len(self.prompt_ids), self.config)
        self.num_positions = len(self.prompt_ids) + limit

    def send(self, update: Update) -> None:
        """Hand an update over; called in the event loop."""
        self.updates.put_nowait((self.index, update))


class Busy(NestlingError):
    """The queue is full."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stopped(NestlingError):
    """The server stops."""
