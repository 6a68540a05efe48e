"""Conversations: what of them is learned, and that none of it is lost or repeated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.base.errors import NestlingError, UsageError
from models.base.labels import IGNORE_INDEX
from train.data.conversations import ChatFormat, checked_messages, encode_conversations, load_chat
from train.data.corpus import open_corpus
from train.data.loader import StepLoader, one_pass
from train.data.pack import Rows
from train.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from train.data.tokens import tokenize

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = ChatFormat(template=TEMPLATE, bos_token="", eos_token="<|endoftext|>")


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]


TALKS = [
    conversation("Why is the sky blue?", "Light scatters."),
    conversation("Hi", "Hello!", "Who are you? Привет 🙂", "A model, привет 🙂."),
    conversation("Nobody answers this."),
    *(conversation(f"How much is {n} and {n}?", f"It is {2 * n}, I think.") for n in range(30)),
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_bpe([json.dumps(TALKS)], vocab_size=300)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    return path


def answers_of(talk: list[dict[str, str]]) -> list[str]:
    return [f"{one['content']}<|endoftext|>" for one in talk if one["role"] == "assistant"]


def test_the_labels_of_a_conversation_are_its_answers_and_their_ends(tokenizer: TextTokenizer) -> None:
    documents = [json.dumps(talk) for talk in TALKS]
    for talk, one in zip(TALKS, encode_conversations(documents, tokenizer, CHAT, 0.0), strict=True):
        labels = one.ids[one.is_label].tolist()
        assert tokenizer.backend.decode(labels, skip_special_tokens=False) == "".join(answers_of(talk))
        assert labels.count(tokenizer.eos_token_id) == len(answers_of(talk)), "as a token, not as text"
        assert one.ids[-1] == tokenizer.eos_token_id
        assert not one.is_label[-1]


@pytest.mark.parametrize("length", [4, 16, 37])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_answer_token_is_lost_or_repeated_by_packing(
    length: int, accumulate: int, tokenizer: TextTokenizer, source: Path, tmp_path: Path
) -> None:
    corpus = open_corpus(str(source), messages_field="messages")
    tokens = tokenize(corpus, tokenizer, cache_dir=tmp_path, chat=CHAT)
    assert tokens.train_labels is not None
    rows = Rows(stream=tokens.train, sequence_length=length, is_label=tokens.train_labels)
    tokens_BT, labels_BT = rows.gather(np.arange(len(rows)))
    labels = labels_BT[labels_BT != IGNORE_INDEX].tolist()
    expected = "".join(text for talk in TALKS for text in answers_of(talk))
    assert tokenizer.backend.decode(labels, skip_special_tokens=False) == expected
    assert rows.num_labels == len(labels)
    assert tokens_BT[:, 0].tolist() == tokens.train[:-1:length].tolist()

    num_steps = -(-len(rows) // (2 * accumulate))
    loader = StepLoader(
        rows=rows, batch_size=2, accumulate=accumulate, seed=3, num_steps=num_steps, repeat=False
    )
    counted = 0
    for step in range(num_steps):
        batches = [loader.batch(step, micro) for micro in range(accumulate)]
        valid = sum(int((one.labels_BT != IGNORE_INDEX).sum()) for one in batches)
        assert {one.num_valid for one in batches} == {max(1, valid)}, "one divisor for the whole step"
        counted += valid
    assert counted == rows.num_labels
    assert sum(batch.num_valid for batch in one_pass(rows, batch_size=len(rows))) == rows.num_labels


def test_streams_and_labels_are_found_again_and_differ_by_template(
    tokenizer: TextTokenizer, source: Path, tmp_path: Path
) -> None:
    def read(template: str) -> Any:
        corpus = open_corpus(str(source), messages_field="messages")
        chat = ChatFormat(template=template, bos_token="", eos_token="<|endoftext|>")
        return tokenize(corpus, tokenizer, cache_dir=tmp_path, valid_fraction=0.3, chat=chat)

    first, again, other = read(TEMPLATE), read(TEMPLATE), read(TEMPLATE.replace("<", "["))
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.valid_labels, again.valid_labels)
    assert len(first.valid) == len(first.valid_labels) > 1
    assert first.sha256 == again.sha256 != other.sha256


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: TextTokenizer) -> None:
    rewriting = "{{ messages | length }}" + TEMPLATE
    chat = ChatFormat(template=rewriting, bos_token="", eos_token="")
    with pytest.raises(NestlingError, match="give conversations of one answer"):
        list(encode_conversations([json.dumps(TALKS[1])], tokenizer, chat, 0.0))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "holds no conversation"),
        ([{"role": "user"}], "holds no conversation"),
        (["Hi"], "holds no conversation"),
        ([{"role": "user", "content": ["Hi"]}], "holds list, not text"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}],
            r"has no text in message 2 \(assistant: content is null\); leave out",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(value: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": TALKS[0]}) + "\n" + json.dumps({"messages": value}) + "\n")
    with pytest.raises(UsageError, match=f"data.messages_field='messages': .*line 2, {reason}"):
        list(open_corpus(str(path), messages_field="messages").documents())
    with pytest.raises(UsageError, match="has no such field; it has: messages"):
        list(open_corpus(str(path), messages_field="chats").documents())


def test_sources_without_fields_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "talks.txt"
    path.write_text("Hi")
    with pytest.raises(UsageError, match=r"has no fields; give \.jsonl"):
        list(open_corpus(str(path), messages_field="messages").documents())
    with pytest.raises(UsageError, match=r"data\.source=stdlib has none"):
        open_corpus("stdlib", messages_field="messages")


def test_the_template_is_that_of_the_tokenizers_folder(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match=r"has no chat template, which data\.messages_field"):
        load_chat(str(tmp_path), opened, key="data.tokenizer")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    chat = load_chat(str(tmp_path), opened, key="data.tokenizer")
    assert chat.eos_token == chat.bos_token == "<|endoftext|>"
    assert checked_messages(TALKS[0], "messages", "here") == json.dumps(TALKS[0])


def test_what_generate_wrote_is_read_as_conversations(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"results": [{"messages": talk} for talk in TALKS[:2]]}, indent=2))
    documents = list(open_corpus(str(path), messages_field="messages").documents())
    assert [json.loads(document) for document in documents] == TALKS[:2]
    path.write_text(json.dumps({"text": "Hi"}, indent=2))
    with pytest.raises(NestlingError, match="one object without results"):
        list(open_corpus(str(path), messages_field="messages").documents())


def test_a_conversation_that_the_template_refuses_is_shown(tokenizer: TextTokenizer) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    refusing = ChatFormat(template=template, bos_token="", eos_token="")
    with pytest.raises(NestlingError, match=r"roles must alternate; it is .*Why is the sky blue"):
        list(encode_conversations([json.dumps(TALKS[0])], tokenizer, refusing, 0.0))
