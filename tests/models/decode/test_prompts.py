import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from models.base.errors import NestlingError, UsageError
from models.decode.prompts import (
    HEADINGS,
    PROMPT_TOKENS,
    Prompt,
    beginnings,
    check_prompts,
    check_room,
    encode_prompts,
    read_prompts,
)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """One token a word."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_each_kind_of_field_gives_its_prompt(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", {"prompt": "one", "text": "no"}, {"turns": ["two", "no"]}, {"text": "three"}
    )
    assert [prompt.text for prompt in read_prompts(path, 8)] == ["one", "two", "three"]
    assert [prompt.text for prompt in read_prompts(path, 2)] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"prompt": "a"}\n{"question": "b"}', "line 2 has none of the fields prompt, turns, text"),
        (b"[1]", "line 1 has none of the fields"),
        (b'\n{"prompt": ', "line 2 is not JSON"),
        (b'{"turns": []}', "line 1: turns holds list, not text"),
        (b'{"turns": [3]}', "line 1: turns holds int, not text"),
        (b'{"prompt": "a"}\n' + b"[" * 100_000, "line 2 is not JSON .nested too deeply"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "line 1 is not JSON"),
        (b"\n\n", "is empty"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_file_without_prompts_is_named_with_its_line(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(NestlingError, match=named) as caught:
        read_prompts(path, 8)
    assert str(path) in str(caught.value)


def test_a_document_gives_its_first_tokens_unless_it_is_too_short(tokenizer: Tokenizer) -> None:
    documents = ["a b", "b " * 100, "a " * PROMPT_TOKENS, "a " * 33, "a " * 50]
    assert beginnings(iter(documents), tokenizer, 2) == [[1] * PROMPT_TOKENS, [0] * PROMPT_TOKENS]
    with pytest.raises(NestlingError, match="no document has more than 32 tokens"):
        beginnings(["a"], tokenizer, 2)


def test_a_prompt_without_tokens_is_named(tokenizer: Tokenizer) -> None:
    assert encode_prompts([Prompt("a b", "1"), Prompt("b", "2")], tokenizer) == [[0, 1], [1]]
    with pytest.raises(NestlingError, match="prompt 2 is empty"):
        encode_prompts([Prompt("a", "prompt 1"), Prompt("", "prompt 2")], tokenizer)


def test_a_continuation_that_leaves_the_context_is_refused() -> None:
    check_room([[0] * 5, [0] * 7], max_new_tokens=3, context=10)
    with pytest.raises(UsageError, match=r"prompt 2 has 7 tokens .* context holds 10; give at most 3"):
        check_room([[0] * 5, [0] * 7], max_new_tokens=4, context=10)
    with pytest.raises(UsageError, match="shorten the prompt"):
        check_room([[0] * 12], max_new_tokens=4, context=10)


def test_the_headings_are_different_python_beginnings() -> None:
    assert len(set(HEADINGS)) == 8
    assert all(text.startswith(("def ", "class ")) and text.endswith("\n") for text in HEADINGS)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert [prompt.text for prompt in read_prompts(path)] == ["a"]


def test_half_a_surrogate_pair_in_a_prompt_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\\ud800b"}')
    assert [prompt.text for prompt in read_prompts(path)] == ["a\N{REPLACEMENT CHARACTER}b"]


def test_every_line_that_cannot_be_continued_is_named_before_any_is(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = ["a", "a " * 12, "b", "a " * 9, ""]
    prompts = read_prompts(write(tmp_path / "p.jsonl", *({"prompt": text} for text in texts)))
    told = r"p.jsonl, line 2 has 12 tokens, .* holds 10: .*at most 9 \(so are 1 more, as in line 5\); nothing"
    with pytest.raises(UsageError, match=told):
        check_prompts(prompts, lambda text: tokenizer.encode(text).ids, context=10, has_start=False)
    with pytest.raises(UsageError, match=r"line 2 has 12 tokens.* at most 9; nothing was decoded"):
        check_prompts(prompts, lambda text: tokenizer.encode(text).ids, context=10, has_start=True)
    check_prompts(prompts, lambda text: tokenizer.encode(text).ids, context=13, has_start=True)
