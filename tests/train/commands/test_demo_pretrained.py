"""`nestling demo --model`, made small: a draft for a model that stays as it is."""

import json
from pathlib import Path

import pytest

from models.checkpoint.folder import load_model
from train.cli import main
from train.commands import demo_pretrained
from train.run.start import hash_tensors

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
WORDS = ["trainer.max_steps=2", "trainer.batch_size=2", "trainer.limit_val_batches=1", "dtype=fp32"]


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_a_draft_is_trained_and_changes_neither_model_nor_text(
    is_chat: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_pretrained, "TOPICS", ("rain", "bread"))
    monkeypatch.setattr(demo_pretrained, "NUM_TOKENS", 12)
    if is_chat:
        monkeypatch.setattr(demo_pretrained, "ASKED", "Why?")
        monkeypatch.setattr(demo_pretrained, "QUESTIONS", ("{}?", "Why {}?"))
    folder = load_model(model)
    if is_chat:
        (tmp_path / "chat").mkdir()
        for file in model.iterdir():
            (tmp_path / "chat" / file.name).write_bytes(file.read_bytes())
        model = tmp_path / "chat"
        (model / "chat_template.jinja").write_text(TEMPLATE)
    out, results = tmp_path / "demo", tmp_path / "demo.json"
    assert main(["demo", "--model", str(model), "--out", str(out), "--json", str(results), *WORDS]) == 0
    measured = json.loads(results.read_text())
    assert measured["decoding"]["ids_equal"]
    assert [member["name"] for member in measured["members"]] == ["D", "XL"]
    assert hash_tensors(load_model(out / "model").model) == hash_tensors(folder.model)
    lines = [json.loads(line) for line in (tmp_path / "demo-answers.jsonl").read_text().splitlines()]
    assert lines
    assert all(("messages" if is_chat else "text") in line for line in lines)


def test_the_steps_fit_the_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_pretrained, "TRAINING_SECONDS", 1e-9)
    recipe = demo_pretrained.choose_recipe(model, tmp_path / "a.jsonl", [], None)
    assert recipe.trainer.max_steps == demo_pretrained.LEAST_STEPS
