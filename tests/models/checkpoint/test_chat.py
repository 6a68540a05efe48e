"""Chat templates are rendered as transformers renders them, where they can reach nothing."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.base.errors import NestlingError
from models.checkpoint.chat import Message, render_chat

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELPERS = (
    "{{ bos_token }}{{ messages | tojson }}{% for m in messages %}"
    "{% if m.role == 'x' %}{% break %}{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
)
TALK: list[Message] = [
    {"role": "system", "content": 'Answer <briefly> & "well".'},
    {"role": "user", "content": " Hi – 日本?\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]


@pytest.mark.parametrize("template", [CHATML, HELPERS])
@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("prompted", [True, False])
def test_a_conversation_is_rendered_as_in_transformers(template: str, first: int, prompted: bool) -> None:
    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(BPE()), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    ours = render_chat(
        template, TALK[first:], bos_token="<s>", eos_token="</s>", add_generation_prompt=prompted
    )
    expected = theirs.apply_chat_template(TALK[first:], tokenize=False, add_generation_prompt=prompted)
    assert ours == expected


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "does not take this conversation"),
        ("{{ messages.append(1) }}", "does not take this conversation"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take this conversation"),
        ("{{ messages[0].content + 1 }}", "damaged"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_line(template: str, line: str) -> None:
    with pytest.raises(NestlingError, match=line):
        render_chat(template, TALK)


def test_a_template_cannot_read_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(NestlingError):
        render_chat("{% include '" + str(tmp_path / "secret") + "' %}", TALK)
