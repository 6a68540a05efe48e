"""The bodies of requests, with OpenAI's names; what an engine of ours adds has vLLM's names.

A field that is not here is refused by its name. So is a value that asks for what is not done: a client learns
so at once, and not from a text that is other than it expects.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.base.errors import UsageError
from models.decode.engine.generation_config import GenerationConfig
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64
Off = Literal[0] | None
"""The value of a setting that is not done."""
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
Tokens = Annotated[list[int], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)


class StreamOptions(_Body):
    """Settings of a stream."""

    include_usage: bool = False
    """End the stream with a chunk that holds the usage."""


class SamplingBody(_Body):
    """Settings of completions and chats."""

    model: str
    """Name of the model, or of a member of its family as NAME:MEMBER."""
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    """Sampling temperature; 0 decodes greedily."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep only the most likely tokens whose probabilities add up to this value."""
    top_k: int = Field(default=0, ge=-1, le=2**31)
    """Keep only the k most likely tokens; 0 and -1 keep all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Keep only tokens at least this fraction as likely as the most likely one."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    """Penalty on tokens that the text has already."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Number of texts to write for each prompt."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    """Random seed: with it a text is written again token for token."""
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    """Texts that end the output and are no part of it."""
    ignore_eos: bool = False
    """Go on after tokens that end a text."""
    stream: bool = False
    """Send the text while it grows, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Settings of the stream."""
    user: str | None = None
    """Has no effect."""
    metadata: dict[str, str] | None = None
    """Has no effect."""
    store: Literal[False] | None = None
    """Nothing is stored."""
    frequency_penalty: Off = None
    """Not done: use `repetition_penalty`."""
    presence_penalty: Off = None
    """Not done: use `repetition_penalty`."""
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    """Not done."""

    def generation_config(self, max_new_tokens: int, seed: int) -> GenerationConfig:
        """Return the engine's settings; with coupled noise drafts change no text."""
        params = SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        return GenerationConfig(
            params=params,
            verifier=COUPLED,
            max_new_tokens=max_new_tokens,
            eos_token_ids=() if self.ignore_eos else None,
            stop=self.stop or (),
            seed=seed,
        )


class CompletionRequest(SamplingBody):
    """Continue one or more prompts."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    """A text or token ids, or a list of either."""
    max_tokens: int | None = Field(default=16, ge=1, le=2**31)
    """The most tokens to write."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Give log-probabilities, and those of this many likeliest tokens."""
    echo: bool = False
    """Put the prompt before the text."""
    best_of: int | None = Field(default=None, ge=1)
    """Not done: only as many as `n`."""
    suffix: Literal[""] | None = None
    """Not done."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(token, int) for token in self.prompt):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    tool_calls: None = None

    def as_message(self) -> Mapping[str, str]:
        """Return it as chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(_Body):
    """The format of an answer."""

    type: Literal["text"]


class ChatRequest(SamplingBody):
    """Answer a conversation."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The turns of the conversation, the last one to be answered."""
    max_tokens: int | None = Field(default=None, ge=1, le=2**31)
    """The most tokens to write; None goes on to the end of the context."""
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31)
    """The same by its newer name."""
    logprobs: bool | None = None
    """Give log-probabilities."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    """Give those of this many likeliest tokens."""
    response_format: TextFormat | None = None
    """Only text."""
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    """Not done."""
    tool_choice: Literal["none", "auto"] | None = None
    """There are no tools to choose."""


class _Open(_Body):
    protocol: int
    session: str | None = Field(default=None, max_length=64)
    """The session to go on with, if the server still has it."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the request that a text holds.

        Raises:
            UsageError: naming the field that is wrong.
        """
        try:
            return cls.model_validate(json.loads(text))
        except ValidationError as error:
            named = ".".join(str(part) for part in error.errors()[0]["loc"]) or "open"
            raise UsageError(f"{named}: {error.errors()[0]['msg']}") from None
        except (ValueError, RecursionError):
            raise UsageError("open: this is not JSON") from None


class OpenRequest(_Open):
    """What a device says first (models/serve/protocol.py)."""

    tokenizer: str = Field(max_length=64)
    vocab_size: int
    prompt_ids: list[int] = Field(min_length=1)
    committed_ids: list[int] = []
    """Ids that a server has committed already, perhaps another one."""
    max_tokens: int = Field(ge=1, le=2**31)
    """Of the whole text, those committed already included."""
    seed: int = Field(ge=-(2**63), lt=2**64)
    temperature: float = Field(ge=0, le=100)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0, le=2**31)
    min_p: float = Field(ge=0, le=1)
    repetition_penalty: float = Field(gt=0, le=100)
    eos_token_ids: list[int] | None = None


class OpenStage(_Open):
    """What a client says first to a stage (models/serve/states.py)."""

    positions: int = Field(default=0, ge=0, le=2**31)
    """The most positions of the text; 0 only asks what the stage is."""
