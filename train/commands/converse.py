"""A conversation at the terminal: each line is a question, and the next one continues its answer."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from models.base.errors import UsageError

if TYPE_CHECKING:
    from models.checkpoint.chat import Message
    from models.decode.decoder import Decoder
    from models.decode.text import GenerationResult, TextStream

HELP = "ask something; /new starts afresh, /exit (or Ctrl-D) ends, Ctrl-C ends an answer"


def first_messages(system: str | None, question: str | None = None) -> "list[Message]":
    """Return the beginning of a conversation."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return messages if question is None else [*messages, {"role": "user", "content": question}]


def converse(
    decoder: "Decoder",
    system: str | None,
    options: dict[str, Any],
    *,
    show: Callable[["TextStream", Console], None],
    console: Console,
) -> "Iterator[tuple[str, GenerationResult]]":
    """Ask and answer until the input ends.

    Args:
        decoder: the model.
        system: the message that comes first, if any.
        options: fields of `GenerationConfig`.
        show: writes an answer as it comes.
        console: the terminal.

    Yields:
        Each question with its answer.
    """
    console.print(HELP, style="dim", markup=False)
    messages = first_messages(system)
    while (question := _ask(console)) is not None:
        if question == "/new":
            messages = first_messages(system)
        elif question:
            conversation: list[Message] = [*messages, {"role": "user", "content": question}]
            answer = _answer(decoder, conversation, options, show, console)
            if answer is not None:
                messages = [*conversation, {"role": "assistant", "content": answer.text}]
                yield question, answer


def _ask(console: Console) -> str | None:
    try:
        question = console.input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if question == "/exit" else question


def _answer(
    decoder: "Decoder",
    messages: "list[Message]",
    options: dict[str, Any],
    show: Callable[["TextStream", Console], None],
    console: Console,
) -> "GenerationResult | None":
    try:
        pieces = decoder.stream(decoder.encode_chat(messages), **options)
    except UsageError as error:  # most likely the context is full
        console.print(f"{error}; /new starts afresh", style="dim", markup=False)
        return None
    try:
        show(pieces, console)
    except KeyboardInterrupt:  # what was said so far stays said
        console.print()
    return pieces.result()
