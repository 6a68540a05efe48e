"""Text from a prompt: the engine's tokens as pieces of text, and the end at a stop string.

What follows a stop string, the rest of the block included, is neither shown nor counted: the output
is plain decoding's.
"""

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

from models.base.errors import UsageError
from models.base.kinds import show
from models.decode.detokenize import Detokenizer, StopStrings, Tokenizer
from models.decode.engine.draft import Draft
from models.decode.engine.engine import Stream, stream, stream_batch
from models.decode.engine.generation_config import DEFAULT, GenerationConfig, changed
from models.decode.engine.policy import Policy
from models.decode.engine.report import Report
from models.decode.sampling.rng import SeededRandom
from models.elastic.view import Model

TextOrIds = str | Iterable[int]
"""A text, which is encoded as training encoded text, or the token ids themselves: a list, a NumPy array or a
torch tensor, of one dimension or of one row."""


@dataclass(frozen=True)
class GenerationResult:
    """A whole continuation."""

    text: str
    """Without the prompt, cut before the stop string if one ended it."""
    ids: list[int]
    """Its tokens, with the end-of-text token; at a stop string, up to the one that completes it."""
    report: Report

    def as_dict(self) -> dict[str, object]:
        """Return everything, for JSON: `text`, `ids` and the report's fields."""
        return {"text": self.text, "ids": self.ids} | self.report.as_dict()


class Piece(NamedTuple):
    """A further piece of the text."""

    text: str
    drafted: bool
    """True if the token that completed it was drafted."""


def stream_text(
    target: Model,
    tokenizer: Tokenizer,
    prompt: TextOrIds,
    config: GenerationConfig = DEFAULT,
    *,
    draft: Draft | None = None,
    gamma: int = 4,
    policy: Policy | None = None,
    **changes: Any,
) -> "TextStream":
    """Continue a prompt, piece by piece.

    Args:
        target: the model whose distribution the output follows.
        tokenizer: the model's.
        prompt: the text to continue, or its token ids; if empty, the model's start (or end)
            token stands for it.
        config: its settings.
        draft: the draft, as in `engine.stream`, like the next two.
        gamma: drafted tokens a round.
        policy: decides round by round.
        changes: fields of the config that are other than there.

    Raises:
        UsageError: as `engine.stream`, and for an empty prompt without a start token.
    """
    config = changed(config, changes)
    prompt_ids = encode_prompt(target, tokenizer, prompt)
    tokens = stream(target, prompt_ids, config, draft=draft, gamma=gamma, policy=policy)
    return TextStream(tokens, TextBuilder(tokenizer, prompt_ids, config.stop_texts))


def generate_batch(
    target: Model,
    tokenizer: Tokenizer,
    prompts: Iterable[TextOrIds],
    config: GenerationConfig = DEFAULT,
    *,
    new_policy: Callable[[], Policy],
    first_row: int = 0,
    **changes: Any,
) -> list[GenerationResult]:
    """Continue several prompts, whose passes share the reading of the weights.

    Each text is what `stream_text` writes for it alone with `SeededRandom(seed, row)`, apart from rounding,
    where rows are counted from `first_row`.

    Args:
        target: the model, as in `stream_text`.
        tokenizer: the model's.
        prompts: the texts to continue, or rows of token ids.
        config: settings of each; where one meets a stop string, the others go on.
        new_policy: called for each prompt.
        first_row: the number of texts of this seed in earlier batches, so that none repeats their draws.
        changes: fields of the config that are other than there.

    Raises:
        UsageError: as `stream_text`, for any of the prompts.
    """
    config = changed(config, changes)
    if isinstance(prompts, str):
        raise UsageError("prompts is one text: give a list of texts, or call generate")
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise UsageError(f"prompts={show(prompts)} is not a list of prompts; give one, as in [text, text]")
    prompt_ids = [encode_prompt(target, tokenizer, prompt) for prompt in _items(prompts) or ()]
    randoms = [SeededRandom(config.seed, first_row + row) for row in range(len(prompt_ids))]
    streams = stream_batch(target, prompt_ids, config, new_policy=new_policy, randoms=randoms)
    texts = [
        TextStream(tokens, TextBuilder(tokenizer, ids, config.stop_texts))
        for tokens, ids in zip(streams, prompt_ids, strict=True)
    ]
    going = list(texts)
    while going:  # in turn, so that none is decoded far beyond its stop string
        going = [text for text in going if next(text, None) is not None]
    return [text.result() for text in texts]


class TextBuilder:
    """Makes text of tokens as they come: whole characters, up to the first stop string.

    Args:
        tokenizer: the model's.
        prompt_ids: tokens that the text follows.
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Collection[str]) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer, prompt_ids), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """True once there was a stop string; what follows it is no part of the text."""
        return self._stop.stopped

    def add(self, token: int) -> str:
        """Return the text that is certain with this token."""
        return self._stop.add(self._detokenizer.add(token))

    def finish(self) -> str:
        """Return the rest."""
        return self._stop.add(self._detokenizer.flush()) + self._stop.flush()


class TextStream(Iterator[Piece]):
    """Pieces of text as they come, none of them empty; `result()` is what was taken so far."""

    def __init__(self, tokens: Stream, text: TextBuilder) -> None:
        self._tokens, self._text = tokens, text
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._pieces = (piece for piece in self._decode() if piece.text)

    def __next__(self) -> Piece:
        """Return the next piece."""
        piece = next(self._pieces)
        self._texts.append(piece.text)
        return piece

    def finish(self) -> GenerationResult:
        """Take all that is left, and return the whole."""
        for _ in self:
            pass
        return self.result()

    def result(self) -> GenerationResult:
        """Return text, tokens and report up to here."""
        return GenerationResult("".join(self._texts), list(self._ids), self._tokens.report)

    def _decode(self) -> Iterator[Piece]:
        drafted, report = False, self._tokens.report
        for token, drafted, _ in self._tokens:
            self._ids.append(token)
            if report.finish_reason != "eos":  # the end token's text is no part of the output
                yield Piece(self._text.add(token), drafted)
            if self._text.stopped:
                self._tokens.close()
                break
        rest = self._text.finish()
        if self._text.stopped:
            report.finish_reason = "stop"
        yield Piece(rest, drafted)


def encode_prompt(target: Model, tokenizer: Tokenizer, prompt: TextOrIds) -> list[int]:
    """Return the token ids of a prompt: of a text, or ids as they are; the start of a text stands for none.

    Raises:
        UsageError: if it is neither, or no text that UTF-8 can hold.
    """
    size = target.full.config.vocab_size
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UsageError(f"--prompt {prompt!r} is not UTF-8 text; encode it so") from None
        # Unlike `encode`, it lets other threads run: a server goes on while it reads a long prompt.
        return tokenizer.encode_batch([prompt])[0].ids or _start_of_text(target)
    ids = None if isinstance(prompt, bytes | Mapping) else _items(prompt)
    if ids is not None and len(ids) == 1 and isinstance(ids[0], list | tuple):
        ids = list(ids[0])  # the one row of a batch, as tokenizers of transformers give it
    if ids is None or not all(_is_token(token, size) for token in ids):
        hint = "; give its input_ids" if isinstance(prompt, Mapping) else ""
        raise UsageError(
            f"prompt={show(prompt)} is neither a text nor a list of token ids below {size}{hint}"
        )
    return [int(token) for token in ids] or _start_of_text(target)


def _items(values: Any) -> list[Any] | None:
    """Return the items of a list, a NumPy array or a torch tensor; None if it has none."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, Iterable) else None


def _is_token(value: object, size: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    try:
        return 0 <= operator.index(value) < size
    except (TypeError, ValueError, RuntimeError):  # of NumPy or torch, and no whole number
        return False


def _start_of_text(target: Model) -> list[int]:
    config = target.full.config
    for token in (config.bos_token_id, config.first_eos_token_id):
        if token is not None:
            return [token]
    raise UsageError("--prompt is empty, and the model has no bos or eos token to start from")
