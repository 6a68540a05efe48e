"""Text from a prompt: the engine's tokens as pieces of text, and the end at a stop string.

What follows a stop string, the rest of the block included, is neither shown nor counted: the output
is plain decoding's. `generate` gives the whole text, `stream_text` the pieces as they come.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

from models.base.errors import UsageError
from models.decode.detokenize import Detokenizer, StopStrings, Tokenizer
from models.decode.engine.engine import BatchOptions, Options, Stream, stream, stream_batch
from models.decode.engine.report import Report
from models.decode.engine.state import Model, elastic_model
from models.decode.sampling.rng import SeededRandom


@dataclass(frozen=True)
class GenerationResult:
    """A whole continuation."""

    text: str
    """Without the prompt, cut before the stop string if one ended it."""
    ids: list[int]
    """Its tokens, with the end-of-text token; at a stop string, up to the one that completes it."""
    report: Report

    def as_dict(self) -> dict[str, object]:
        """Everything, for JSON: `text`, `ids` and the report's fields."""
        return {"text": self.text, "ids": self.ids} | self.report.as_dict()


class Piece(NamedTuple):
    """Some more of the text."""

    text: str
    drafted: bool
    """Whether the token that completed it was drafted."""


def generate(
    target: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: Collection[str] = (),
    seed: int = 0,
    **options: Unpack[Options],
) -> GenerationResult:
    """Continue a prompt; the arguments are those of `stream_text`."""
    pieces = stream_text(target, tokenizer, prompt, stop=stop, seed=seed, **options)
    for _ in pieces:
        pass
    return pieces.result()


def generate_batch(
    target: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: Collection[str] = (),
    seed: int = 0,
    **options: Unpack[BatchOptions],
) -> list[GenerationResult]:
    """Continue several prompts, whose passes share the reading of the weights.

    Each text is what `stream_text` writes for it alone with `SeededRandom(seed, row)`, apart from rounding.

    Args:
        target: as `stream_text`, like everything that is not told here.
        tokenizer: the model's.
        prompts: the texts to continue.
        stop: texts that end an output; the others go on.
        seed: of every random choice; each row makes its own.
        options: `new_policy`, `params`, `max_new_tokens`, `eos_token_ids` and `verifier`, as
            `engine.stream_batch` takes them.

    Raises:
        UsageError: as `stream_text`, for any of the prompts.
    """
    prompt_ids = [tokenizer.encode(prompt).ids or _start_of_text(target) for prompt in prompts]
    randoms = [SeededRandom(seed, row) for row in range(len(prompts))]
    streams = stream_batch(target, prompt_ids, randoms=randoms, **options)
    texts = [
        TextStream(tokens, Detokenizer(tokenizer, ids), StopStrings(stop))
        for tokens, ids in zip(streams, prompt_ids, strict=True)
    ]
    going = list(texts)
    while going:  # in turn, so that none is decoded far beyond its stop string
        going = [text for text in going if next(text, None) is not None]
    return [text.result() for text in texts]


def stream_text(
    target: Model,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stop: Collection[str] = (),
    seed: int = 0,
    **options: Unpack[Options],
) -> "TextStream":
    """Continue a prompt, piece by piece.

    Args:
        target: the model whose law the output follows.
        tokenizer: the model's.
        prompt: the text to continue; if empty, the model's start (or end) token stands for it.
        stop: texts that end the output, wherever they begin or end; they are not part of it.
        seed: of every random choice.
        options: `draft`, `gamma`, `policy`, `params`, `max_new_tokens`, `eos_token_ids` and `verifier`,
            as `engine.stream` takes them.

    Raises:
        UsageError: as `engine.stream`, and for an empty prompt without a start token.
    """
    prompt_ids = tokenizer.encode(prompt).ids or _start_of_text(target)
    tokens = stream(target, prompt_ids, random=SeededRandom(seed), **options)
    return TextStream(tokens, Detokenizer(tokenizer, prompt_ids), StopStrings(stop))


class TextStream(Iterator[Piece]):
    """Pieces of text as they come, none of them empty; `result()` is what was taken so far."""

    def __init__(self, tokens: Stream, detokenizer: Detokenizer, stop: StopStrings) -> None:
        self._tokens, self._detokenizer, self._stop = tokens, detokenizer, stop
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._pieces = (piece for piece in self._decode() if piece.text)

    def __next__(self) -> Piece:
        """The next piece."""
        piece = next(self._pieces)
        self._texts.append(piece.text)
        return piece

    def result(self) -> GenerationResult:
        """Text, tokens and report up to here."""
        return GenerationResult("".join(self._texts), list(self._ids), self._tokens.report)

    def _decode(self) -> Iterator[Piece]:
        drafted, report = False, self._tokens.report
        for token, drafted in self._tokens:
            self._ids.append(token)
            if report.finish_reason != "eos":  # the end token's text is no part of the output
                yield Piece(self._stop.add(self._detokenizer.add(token)), drafted)
            if self._stop.stopped:
                self._tokens.close()
                break
        rest = self._stop.add(self._detokenizer.flush()) + self._stop.flush()
        if self._stop.stopped:
            report.finish_reason = "stop"
        yield Piece(rest, drafted)


def _start_of_text(target: Model) -> list[int]:
    config = elastic_model(target).config
    for token in (config.bos_token_id, config.eos_token_id):
        if token is not None:
            return [token]
    raise UsageError("--prompt is empty, and the model has no bos or eos token to start from")
