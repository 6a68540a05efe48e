"""`nestling generate --chat`: questions and conversations, by the model's own template."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.cli import main

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def chat_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def run(folder: Path, results: Path, *arguments: str) -> dict[str, Any]:
    words = ["generate", str(folder), "--dtype", "fp32", "--max-new-tokens", "6", "--json", str(results)]
    assert main([*words, *arguments]) == 0
    written: dict[str, Any] = json.loads(results.read_text())
    return written


def test_a_question_is_what_its_template_makes_of_it(chat_model: Path, tmp_path: Path) -> None:
    asked = run(chat_model, tmp_path / "a.json", "--chat", "--system", "Be brief.", "--prompt", "Why?")
    text = "[system] Be brief.\n[user] Why?\n[assistant]"
    plain = run(chat_model, tmp_path / "b.json", "--prompt", text)
    assert asked["ids"] == plain["ids"]
    assert asked["prompt"] == "Why?"


def test_each_line_of_a_file_is_a_question(chat_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    batch = run(chat_model, tmp_path / "a.json", "--chat", "--prompts", str(prompts))["results"]
    one = run(chat_model, tmp_path / "b.json", "--chat", "--prompt", "How?", "--draft", "none")
    assert [result["prompt"] for result in batch] == ["Why?", "How?"]
    assert batch[1]["ids"] == one["ids"]


def test_a_conversation_goes_on_from_its_answers_until_the_input_ends(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\nHow?\n/new\nHow?\n"))
    turns = run(chat_model, tmp_path / "a.json", "--chat", "--max-new-tokens", "4")["results"]
    assert [turn["prompt"] for turn in turns] == ["Why?", "How?", "How?"]
    text = f"[user] Why?\n[assistant] {turns[0]['text']}\n[user] How?\n[assistant]"
    second = run(chat_model, tmp_path / "b.json", "--prompt", text, "--max-new-tokens", "4")
    assert turns[1]["ids"] == second["ids"]
    alone = run(chat_model, tmp_path / "c.json", "--chat", "--prompt", "How?", "--max-new-tokens", "4")
    assert turns[2]["ids"] == alone["ids"]


def test_a_conversation_beyond_the_context_says_so_and_goes_on(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a b c d e f g h " * 40 + "\nWhy?\n/exit\nHow?\n"))
    turns = run(chat_model, tmp_path / "a.json", "--chat")["results"]
    assert [turn["prompt"] for turn in turns] == ["Why?"]
    assert "/new starts afresh" in capsys.readouterr().out


def test_what_is_missing_is_named(model: Path, chat_model: Path, fails: Fails) -> None:
    assert "no chat template" in fails("generate", model, "--chat", "--prompt", "Why?", code=1)
    assert "add --chat" in fails("generate", model, "--system", "Be brief.", "--prompt", "x", code=2)
    assert "give one of them" in fails("generate", chat_model, code=2)
