"""Tokens to text, a token at a time: whole characters only, and nothing of a stop string.

Both parts take what comes and return what is certain by then, so that all of it joined does
not depend on how it came in blocks.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from models.base.errors import NestlingError, UsageError, is_panic

# Decoders of some tokenizers drop a leading space: a few tokens of context keep it.
NUM_CONTEXT_TOKENS = 6
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte of a character that has no token of its own (byte fallback: Llama 2, Mistral, Gemma)."""


class Encoded(Protocol):
    """The result of encoding."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        ...


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that decoding needs."""

    def encode(self, sequence: str, /) -> Encoded:
        """Turn text into tokens."""
        ...

    def encode_batch(self, texts: Sequence[str], /) -> Sequence[Encoded]:
        """Turn texts into tokens."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Turn tokens into text without the special ones."""
        ...

    def id_to_token(self, token: int, /) -> str | None:
        """Return a token's own spelling."""
        ...


class Detokenizer:
    """Text of the tokens after a prompt: joined, it is `continuation` of them.

    It decodes a short window, not everything each time. Decoders with byte fallback turn a whole run of
    byte tokens into replacement characters if one of them does not fit, so that nothing in a run is certain
    before it ends.

    Some decoders (Strip) panic over a window that is too short for them: the rest of the text then comes at
    the end, decoded as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids, self._ids = list(prompt_ids), list[int]()
        self._window = list(prompt_ids)
        self._num_characters = 0
        self._in_bytes = False
        self._panicked = False
        self._unless_it_panics(self._begin)

    def add(self, token: int) -> str:
        """Return the characters that are certain with this token."""
        self._ids.append(token)
        return self._unless_it_panics(lambda: self._add(token))

    def flush(self) -> str:
        """Return the rest; an unfinished character becomes U+FFFD.

        Raises:
            NestlingError: if the tokenizer cannot decode these tokens.
        """
        rest = self._unless_it_panics(lambda: self._show(self._new_text()))
        if self._panicked:
            return continuation(self._tokenizer, self._prompt_ids, self._ids)[self._num_characters :]
        return rest

    def _unless_it_panics(self, decode: Callable[[], str]) -> str:
        if self._panicked:
            return ""
        try:
            text = decode()
        except BaseException as error:
            if not is_panic(error):
                raise
            self._panicked = True
            return ""
        self._num_characters += len(text)
        return text

    def _begin(self) -> str:
        self._shorten()
        return ""

    def _add(self, token: int) -> str:
        self._window.append(token)
        if self._is_byte(token):
            self._in_bytes = True
        elif self._in_bytes:  # a token without text, such as a special one, does not end a run
            self._in_bytes = not self._tokenizer.decode([token])
        if self._in_bytes:
            return ""
        text = self._new_text()
        return "" if text.endswith(UNFINISHED) else self._show(text)

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(self._tokenizer.id_to_token(token) or "") is not None

    def _new_text(self) -> str:
        shown = self._tokenizer.decode(self._window[: self._num_shown])
        return self._tokenizer.decode(self._window)[len(shown) :]

    def _show(self, text: str) -> str:
        if text:
            self._shorten()
        self._num_shown = len(self._window)
        return text

    def _shorten(self) -> None:
        """Keep the last few tokens, more where the first has no text or may be inside a run of bytes."""
        window, size = self._window, NUM_CONTEXT_TOKENS
        while size < len(window) and (
            self._is_byte(window[-size]) or not self._tokenizer.decode([window[-size]])
        ):
            size *= 2
        self._window = window[-size:]
        self._num_shown = len(self._window)


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of some tokens after others, as the tokenizer decodes their concatenation.

    Raises:
        NestlingError: if the tokenizer cannot decode these tokens.
    """
    try:
        return tokenizer.decode([*prompt_ids, *ids])[len(tokenizer.decode(prompt_ids)) :]
    except BaseException as error:
        if not is_panic(error):
            raise
        raise NestlingError(
            f"the tokenizer cannot decode these tokens ({error}); mend `decoder` in tokenizer.json"
        ) from None


class StopStrings:
    """Passes text on up to the first stop string; holds back what may be the beginning of one.

    The first is the one that is complete first, as if the text came a character at a time.

    >>> stop = StopStrings(["END"])  # or "END"
    >>> stop.add("The E"), stop.add("N"), stop.add("d EN"), stop.add("D of it"), stop.stopped
    ('The ', '', 'ENd ', '', True)
    """

    def __init__(self, stop: Collection[str]) -> None:
        stop = (stop,) if isinstance(stop, str) else stop  # one text, as transformers takes it, too
        if "" in stop:
            raise UsageError("--stop is empty: give the text that ends the output")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Return the text that is certainly before any stop string; nothing once one has been found."""
        if self.stopped:
            return ""
        text = self._held + text
        starts = {stop: text.find(stop) for stop in self._stop if stop in text}
        if starts:
            self.stopped, self._held = True, ""
            first = min(starts, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            return text[: starts[first]]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return the text that was held back, when no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return length of the longest end of `text` that is a beginning of `stop`, but not all of it.

    >>> _overlap("abab", "abac")
    2
    """
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
