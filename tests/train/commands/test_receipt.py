"""A receipt says what was run, and running it again finds every change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint.receipt import read_receipt
from train.cli import main

Fails = Callable[..., str]


@pytest.fixture(scope="module", params=["S", "ffn=1:0.5:0.5"])
def extraction(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("receipt") / "member"
    assert main(["extract", str(model), "--granularity", request.param, "--out", str(out)]) == 0
    return out


def test_it_is_repeated_anywhere(
    extraction: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere, results = tmp_path / "elsewhere", tmp_path / "verify.json"
    shutil.copytree(extraction, elsewhere)
    fields = read_receipt(elsewhere)
    assert [one["check"] for one in fields["checks"]] == ["greedy ids", "logits", "tokens of texts"]
    assert all(one["holds"] for one in fields["checks"])
    assert {"commit", "versions", "hardware"} <= fields["card"].keys()
    assert len(fields["source"]["parent_sha256"]) == 64
    assert main(["verify", str(elsewhere), "--json", str(results)]) == 0
    assert "FAILS" not in capsys.readouterr().out
    written = json.loads(results.read_text())
    assert written["passed"] is True
    assert [one["check"] for one in written["receipt"]] == [
        "files",
        "greedy ids",
        "logits",
        "tokens of texts",
    ]


def test_every_change_is_found(extraction: Path, tmp_path: Path, fails: Fails) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(extraction, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * torch.linspace(-1, 2, 64)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    line = fails("verify", other, code=1)
    assert "files" in line
    assert "logits" in line
    (other / "receipt.json").write_text('{"format": 1, "files": {}}')
    assert "receipt.json" in fails("verify", other, code=1)


def test_the_card_says_how_to_load_it(extraction: Path) -> None:
    card = (extraction / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    ragged = "modeling_nestling" in "".join(path.name for path in extraction.iterdir())
    assert ("trust_remote_code=True" in card) == ragged
    assert "| S | ffn=0.25 |" in card
    if not ragged:  # its loss is known from training
        assert "<circle" in (extraction / "frontier.svg").read_text()
