"""A receipt says what was run, and running it again finds every change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint.receipt import read_receipt, receipt_path
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


def test_a_file_has_a_receipt_that_follows_it_and_finds_every_change(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    out, elsewhere = tmp_path / "S.gguf", tmp_path / "elsewhere"
    command = ["extract", str(model), "--granularity", "ffn=1:0.5:0.5", "--out", str(out), "--format", "gguf"]
    assert main([*command, "--dtype", "q4_0", "--data", str(text)]) == 0
    fields = read_receipt(out)
    assert fields["rounding"]["text"] == str(text)
    assert fields["rounding"]["kl"] > 0
    assert 0 < fields["rounding"]["alpha_error"] < 0.1
    elsewhere.mkdir()
    for path in (out, receipt_path(out)):
        path.rename(elsewhere / path.name)
    moved = elsewhere / out.name
    assert main(["verify", str(moved)]) == 0
    assert "FAILS" not in capsys.readouterr().out
    content = bytearray(moved.read_bytes())
    content[-1000] ^= 64  # in the last tensor, which is the final norm
    moved.write_bytes(content)
    line = fails("verify", moved, code=1)
    assert "files" in line
    receipt_path(moved).write_text("years of work")
    assert "receipt.json" in fails(*command[:-3], moved, "--format", "gguf", "--force", code=1)


@pytest.mark.parametrize("flags", [[], ["--format", "gguf"]])
def test_a_pair_is_repeated_anywhere_and_a_member_of_another_one_is_found(
    flags: list[str],
    model: Path,
    text: Path,
    tmp_path: Path,
    fails: Fails,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, elsewhere, results = tmp_path / "pair", tmp_path / "elsewhere", tmp_path / "verify.json"
    command = ["extract", str(model), "--pair", "D:XL", "--data", str(text), "--out", str(out), *flags]
    assert main(command) == 0
    out.rename(elsewhere)
    assert main(["verify", str(elsewhere), "--json", str(results)]) == 0
    checks = {one["check"]: one for one in json.loads(results.read_text())["receipt"]}
    assert {"files of the target", "logits of the draft", "alpha sampled", "alpha greedy"} <= checks.keys()
    assert checks["alpha sampled"]["value"] < 1e-3
    pair = json.loads((elsewhere / "pair.json").read_text())
    assert pair["alpha_error"]["sampled"] > 0
    pair["card"]["hardware"]["cpu"] = "a phone"
    (elsewhere / "pair.json").write_text(json.dumps(pair))
    assert "measured on another machine" not in capsys.readouterr().out
    assert main(["verify", str(elsewhere)]) == 0
    assert "of a phone, GPU: none); extract the pair here" in " ".join(capsys.readouterr().out.split())
    pair["draft"]["sha256"] = "0" * 64
    (elsewhere / "pair.json").write_text(json.dumps(pair))
    assert "weights that pair.json names" in fails("verify", elsewhere, code=1)
    (elsewhere / "pair.json").write_text(json.dumps(pair | {"format": 2}))
    assert "pair.json: it is no pair that this release reads" in fails("verify", elsewhere, code=1)
    (elsewhere / "pair.json").write_text("{}")
    assert "pair.json: it lacks what a pair has" in fails("verify", elsewhere, code=1)
