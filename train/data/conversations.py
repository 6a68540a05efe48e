"""Conversations as documents: checked, and written by a chat template; their answers alone are learned.

A conversation travels as its JSON, so that hashes, the split and the order are those of any document. It is
rendered when it is tokenized:

    <user>Why?<end><assistant>Because.<end>    eos
    .    .    .   .      .       x      x       .         x: a label; the model learns to write these

An answer is what the template adds after the tokens that begin one, up to its end token.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.base.errors import NestlingError, UsageError
from models.base.files import read_json
from models.checkpoint.chat import Message, read_chat_template, render_chat
from models.checkpoint.gguf_read import is_gguf, read_gguf_tokenizer
from models.checkpoint.tokenizer import SETTINGS, for_bare_text, token_name
from train.data.documents import checked_text, is_validation
from train.data.stream import Stream, stream_dtype
from train.data.tokenizer import TextTokenizer

ANSWERS = "assistant"
BATCH = 256
"""Conversations that are tokenized at once."""
EXAMPLE = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]'


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a model writes conversations.

    Args:
        template: Jinja.
        bos_token: text of the token that begins a text.
        eos_token: text of the token that ends one.
    """

    template: str
    bos_token: str
    eos_token: str

    def render(self, messages: list[Message], *, asks: bool = False) -> str:
        """Return a conversation as text; with `asks`, and the tokens that begin an answer."""
        return render_chat(
            self.template,
            messages,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            add_generation_prompt=asks,
        )

    def spans(self, messages: list[Message]) -> tuple[str, list[range]]:
        """Return a conversation as text, and the characters of each answer in it.

        Raises:
            NestlingError: if the template writes what came before otherwise when more follows.

        >>> chat = ChatFormat(
        ...     template="{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}"
        ...     "{% if add_generation_prompt %}<assistant>{% endif %}",
        ...     bos_token="",
        ...     eos_token="",
        ... )
        >>> text, (answer,) = chat.spans(
        ...     [{"role": "user", "content": "Why"}, {"role": "assistant", "content": "So"}]
        ... )
        >>> text[answer.start : answer.stop]
        'So.'
        """
        text = self.render(messages)
        answers = []
        for number, message in enumerate(messages):
            if message["role"] == ANSWERS:
                before, through = (
                    self.render(messages[:number], asks=True),
                    self.render(messages[: number + 1]),
                )
                if not text.startswith(through) or not through.startswith(before):
                    raise NestlingError(
                        "the chat template writes a part of a conversation otherwise when more follows, so "
                        "that its answers cannot be told from the rest; give conversations of one answer"
                    )
                answers.append(range(len(before), len(through.rstrip())))
        return text, answers


def load_chat(source: str, tokenizer: TextTokenizer, *, key: str) -> ChatFormat:
    """Read the chat template that came with a tokenizer.

    Args:
        source: a model folder, a tokenizer.json or a GGUF file.
        tokenizer: read from there.
        key: name in errors of the setting.

    Raises:
        UsageError: if there is none.
    """
    path = Path(source).expanduser()
    template, bos = None, None
    if is_gguf(path):
        file = read_gguf_tokenizer(path)
        template, bos = file.chat_template, file.bos_token
    else:
        folder = path.parent if path.is_file() else path
        template = read_chat_template(folder)
        settings = folder / SETTINGS
        bos = token_name(read_json(settings).get("bos_token")) if settings.is_file() else None
    if template is None:
        raise UsageError(
            f"{key}={source}: has no chat template, which data.messages_field needs; give a chat model"
        )
    return ChatFormat(template=template, bos_token=bos or "", eos_token=tokenizer.eos_token)


def checked_messages(value: object, field: str, where: str, setting: str = "data.messages_field") -> str:
    """Return a conversation as JSON, the same for the same messages.

    Raises:
        UsageError: if the value is no list of messages with role and content.

    >>> checked_messages([{"content": "Hi", "role": "user", "id": 3}], "messages", "line 1")
    '[{"role": "user", "content": "Hi"}]'
    """
    refused = UsageError(
        f"{setting}={field!r}: {where} holds no conversation; expected a list as in {EXAMPLE}"
    )
    if not isinstance(value, list):
        raise refused
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise refused
        if message["content"] is None:  # as where an assistant calls a tool
            raise UsageError(
                f"{setting}={field!r}: {where} has no text in message {number} ({message['role']}: content "
                "is null); leave out conversations that call tools, or write an empty text"
            )
        role, content = (checked_text(message[name], field, where, setting) for name in ("role", "content"))
        messages.append({"role": role, "content": content})
    return json.dumps(messages, ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation in tokens.

    Args:
        ids: its tokens, and the end of a document.
        is_label: which of them are learned.
        is_validation: whether it is held out.
        num_chars: characters of its text.
    """

    ids: Stream
    is_label: NDArray[np.bool_]
    is_validation: bool
    num_chars: int


def encode_conversations(
    documents: Iterable[str], tokenizer: TextTokenizer, chat: ChatFormat, valid_fraction: float
) -> Iterator[Conversation]:
    """Yield each conversation in tokens; its special tokens are those that the template writes."""
    backend, dtype = for_bare_text(tokenizer.backend), stream_dtype(tokenizer.vocab_size)
    rest = iter(documents)
    while batch := list(islice(rest, BATCH)):
        rendered = [_spans(chat, document) for document in batch]
        encodings = backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for document, (text, answers), encoding in zip(batch, rendered, encodings, strict=True):
            starts = np.array([start for start, _ in encoding.offsets], np.int64)
            is_label = np.zeros(len(starts) + 1, np.bool_)
            for answer in answers:
                is_label[:-1] |= (starts >= answer.start) & (starts < answer.stop)
            yield Conversation(
                ids=np.array([*encoding.ids, tokenizer.eos_token_id], dtype),
                is_label=is_label,
                is_validation=is_validation(document, valid_fraction),
                num_chars=len(text),
            )


def _spans(chat: ChatFormat, document: str) -> tuple[str, list[range]]:
    try:
        return chat.spans(json.loads(document))
    except NestlingError as error:
        raise NestlingError(f"data.messages_field: {error}; it is {document[:100]}...") from None
