"""`nestling order`: a folder whose prefixes are better and whose full model is the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint.folder import load_model, save_model
from models.elastic.granularity import Granularity
from models.elastic.ownership import Ownership
from models.elastic.owning import own
from train.cli import main

Fails = Callable[..., str]


def test_the_new_folder_is_the_same_model_in_a_better_order(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "ordered", tmp_path / "order.json"
    words = [
        "order",
        str(model),
        "--data",
        str(text),
        "--out",
        str(out),
        "--drop",
        "1",
        "--max-tokens",
        "300",
    ]
    assert main([*words, "--json", str(results)]) == 0
    written, shown = json.loads(results.read_text()), capsys.readouterr().out
    losses = written["losses"]
    assert set(losses) == {"as it came", "contribution", "activation", "magnitude", "random"}
    assert {round(of["full"], 4) for of in losses.values()} == {round(losses["random"]["full"], 4)}
    assert written["rule"] == min(losses, key=lambda name: sum(losses[name].values()))
    assert written["rule"] in shown
    assert "the full model's greedy tokens are the same" in shown
    ours, theirs = load_model(model), load_model(out)
    tokens_BT = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.model(tokens_BT), theirs.model(tokens_BT), atol=1e-4, rtol=0)
    (dropped,) = written["dropped"]
    assert str(theirs.family["D2"]) == dropped["layers"]
    assert theirs.provenance["ordered_from"] == str(model)


def test_the_text_is_read_as_the_models_own_was_or_as_the_flag_says(
    model: Path, tmp_path: Path, fails: Fails
) -> None:
    data = tmp_path / "t.jsonl"
    data.write_text(json.dumps({"content": "the quick brown fox " * 40}) + "\n")
    words = ["order", str(model), "--data", str(data), "--max-tokens", "100", "--drop", "0"]
    assert "text_field" in fails(*words, "--out", tmp_path / "no", code=2).replace("-", "_")
    assert main([*words, "--out", str(tmp_path / "flag"), "--text-field", "content"]) == 0
    model = Path(shutil.copytree(model, tmp_path / "model"))
    words[1] = str(model)
    told = json.loads((model / "nestling.json").read_text())
    told["provenance"] = {**told["provenance"], "recipe": {"data": {"text_field": "content"}}}
    (model / "nestling.json").write_text(json.dumps(told))
    assert main([*words, "--out", str(tmp_path / "own")]) == 0


def test_a_rule_that_was_asked_for_is_taken(model: Path, text: Path, tmp_path: Path) -> None:
    results = tmp_path / "order.json"
    words = ["order", str(model), "--data", str(text), "--out", str(tmp_path / "o"), "--max-tokens", "100"]
    assert main([*words, "--drop", "0", "--rule", "random", "--json", str(results)]) == 0
    assert json.loads(results.read_text())["rule"] == "random"
    assert json.loads(results.read_text())["dropped"] == []


def test_a_name_that_another_member_has_is_left_to_it(model: Path, text: Path, tmp_path: Path) -> None:
    folder = load_model(model)
    taken = Granularity.parse("ffn=0.5")
    named = save_model(
        tmp_path / "named", folder.model, tokenizer=folder.tokenizer, family={**folder.family, "D2": taken}
    )
    words = [
        "order",
        str(named),
        "--data",
        str(text),
        "--drop",
        "1",
        "--max-tokens",
        "100",
        "--rule",
        "magnitude",
    ]
    for _ in range(2):  # its own folder may be replaced
        assert main([*words, "--out", str(tmp_path / "o")]) == 0
    family = load_model(tmp_path / "o").family
    assert family["D2"] == taken
    assert family["D2-2"].layers is not None


@pytest.mark.parametrize("command", ["order", "import"])
def test_a_family_that_was_trained_is_not_replaced(
    command: str, model: Path, text: Path, tmp_path: Path, fails: Fails
) -> None:
    family = tmp_path / "family"
    shutil.copytree(model, family)
    words = ["--data", text] if command == "order" else []
    line = fails(command, model, *words, "--out", family, code=2)
    assert line.endswith(f"holds a model that `{command}` did not make; choose another place or empty it")
    assert (family / "nestling.json").read_bytes() == (model / "nestling.json").read_bytes()


def test_the_model_that_is_read_is_never_replaced(model: Path, text: Path, fails: Fails) -> None:
    before = (model / "model.safetensors").read_bytes()
    assert "--out" in (line := fails("order", model, "--data", text, "--out", model, code=2))
    assert line.endswith("is MODEL itself; choose another place")
    assert (model / "model.safetensors").read_bytes() == before


def test_what_cannot_be_is_named_before_the_work(
    model: Path, text: Path, tmp_path: Path, fails: Fails
) -> None:
    words = ("order", model, "--out", tmp_path / "o")
    assert "--rule best_of_all" in fails(*words, "--data", text, "--rule", "best_of_all", code=2)
    assert "--drop 3 must be 0 to 2" in fails(*words, "--data", text, "--drop", "3", code=2)
    assert "nowhere.txt" in fails(*words, "--data", tmp_path / "nowhere.txt", code=2)
    assert not (tmp_path / "o").exists()


def test_what_members_owned_is_left_out_and_told(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = load_model(model)
    own(opened.model, opened.family, Ownership(rank=2))
    given = save_model(tmp_path / "given", opened.model, tokenizer=opened.tokenizer, family=opened.family)
    names = ", ".join(one.name for one in load_model(given).model.members)
    assert names
    words = ["--data", str(text), "--max-tokens", "100", "--drop", "0", "--rule", "random"]
    assert main(["order", str(given), *words, "--out", str(tmp_path / "ordered")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"what {names} owned is left out: they have other neurons now; train them again" in shown
    ordered = load_model(tmp_path / "ordered")
    assert ordered.model.members == []
    assert ordered.family == opened.family
