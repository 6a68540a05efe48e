"""Chat templates are rendered as transformers renders them, where they can reach nothing."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.base.errors import NestlingError
from models.checkpoint.chat import Message, read_chat_template, render_chat
from models.checkpoint.chat_sandbox import render_within_bounds

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


EXTRAS = (
    "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '|' ~ 1 }}{% endgeneration %}"
    "{% else %}{{ m.content * 2 + '.' }}{{ '%s %(' | replace('(', 'd') | format(m.role, 123456789012) }}"
    "{{ 'n=%d' % 123456789012 }}{{ '{}: {:>4}'.format(123456789012, 5) }}"
    "{{ 'a%5s' | format('b') | center(9) }}{{ 'tel {12345678, %123456789'.strip() }}{{ 0 % 123456789 }}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, HELPERS, EXTRAS])
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
        ("{{ raise_exception('no\\nsuch') }}", "conversation: no such$"),
        ("{{ raise_exception(5) }}", "conversation: 5$"),
        ("{{ 1 / 0 }}", r"damaged \(ZeroDivisionError: division by zero\); restore it"),
        ("{{ 10.0 ** 1000 }}", "damaged .OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "damaged .RecursionError"),
        ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "damaged .RecursionError"),
        ("{{ range(10 ** 9) | list }}", "damaged .OverflowError"),
        ("{{ ('a' * 3000000000) | length }}", "more than 10,000,000 characters"),
        ("{{ '%3000000000s' | format('a') }}", "more than 10,000,000 characters"),
        ("{{ '%*s' % (3000000000, 'a') }}", "more than 10,000,000 characters"),
        ("{{ '{:3000000000}'.format('a') }}", "more than 10,000,000 characters"),
        ("{{ 'a'.ljust(3000000000) }}", "more than 10,000,000 characters"),
        ("{{ 'a' | center(3000000000) }}", "more than 10,000,000 characters"),
        ("{{ 'a\\nb' | indent(width=3000000000) }}", "more than 10,000,000 characters"),
        ("{{ (9 ** (9 ** 9)) | string }}", "more than 10,000,000 characters"),
        (
            "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            "more",
        ),
        (
            "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
            "more",
        ),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than 10,000,000 characters"),
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_one_line(template: str, line: str) -> None:
    with pytest.raises(NestlingError, match=line):
        render_chat(template, TALK)


def test_a_template_cannot_read_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(NestlingError):
        render_chat("{% include '" + str(tmp_path / "secret") + "' %}", TALK)


def test_a_template_that_runs_for_ever_is_stopped(
    wait_until: Callable[[Callable[[], object]], None],
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    threads = threading.active_count()
    with pytest.raises(TemplateError, match=r"more than 0\.2 seconds"):
        render_within_bounds(endless, {}, seconds=0.2)
    wait_until(lambda: threading.active_count() <= threads)


def test_half_a_surrogate_pair_in_a_conversation_is_replaced() -> None:
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": "a\ud800b"}]) == "a\ufffdb"


@pytest.mark.parametrize(
    "stated", [5, ["a"], [{"name": "default"}], [{"name": "default", "template": 5}], {"default": []}]
)
def test_settings_whose_template_is_no_text_are_named(stated: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
    with pytest.raises(NestlingError, match=r"tokenizer_config\.json: chat_template=.* restore it"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize(
    "stated", ["x", {"default": "x", "tool": "y"}, [{"name": "default", "template": "x"}]]
)
def test_the_template_of_several_that_is_the_default_is_read(stated: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
    assert read_chat_template(tmp_path) == "x"


def test_a_template_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{1}}")
    with pytest.raises(NestlingError, match=r"chat_template\.jinja is not UTF-8"):
        read_chat_template(tmp_path)
