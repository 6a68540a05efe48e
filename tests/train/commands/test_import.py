"""`nestling import`: a GGUF file or a stock folder becomes a folder that every command takes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint.folder import load_model
from models.checkpoint.weights import weights_of
from train.cli import main

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def file(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "full.gguf"
    assert main(["extract", str(model), "--granularity", "full", "--format", "gguf", "--out", str(out)]) == 0
    return out


def test_a_file_becomes_a_folder_with_the_same_weights_tokenizer_and_text(
    model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "imported", tmp_path / "import.json"
    assert main(["import", str(file), "--out", str(out), "--json", str(results)]) == 0
    text = capsys.readouterr().out
    assert "217,536 parameters in 3 layers, dequantized from F32, with a tokenizer" in text
    assert "equal in stock transformers" in text
    written = json.loads(results.read_text())
    assert written["parameters"] == 217_536
    assert written["difference"] <= 1e-5
    ours, theirs = load_model(model), load_model(out)
    for name, tensor in weights_of(ours.model).items():
        assert torch.equal(weights_of(theirs.model)[name], tensor)
    assert ours.tokenizer is not None
    assert theirs.tokenizer is not None
    sample = "def area(width):\n    return width ** 2  # é 🙂"
    assert ours.tokenizer.encode(sample).ids == theirs.tokenizer.encode(sample).ids
    assert theirs.provenance["imported_from"] == str(file)


def test_every_command_takes_the_file_itself(model: Path, file: Path, tmp_path: Path) -> None:
    prompt = [
        "--prompt",
        "def area(",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
        "--draft",
        "none",
        "--json",
    ]
    ids = []
    for source in (model, file):
        results = tmp_path / "generate.json"
        assert main(["generate", str(source), *prompt, str(results)]) == 0
        ids.append(json.loads(results.read_text())["ids"])
    assert ids[0] == ids[1]


def test_a_dtype_is_kept_on_disk(file: Path, tmp_path: Path) -> None:
    assert main(["import", str(file), "--out", str(tmp_path / "half"), "--dtype", "bf16"]) == 0
    assert load_model(tmp_path / "half").model.dtype == torch.bfloat16


def test_what_cannot_be_is_one_line_and_leaves_nothing(
    model: Path, file: Path, tmp_path: Path, fails: Fails
) -> None:
    out = tmp_path / "out"
    assert "nowhere.gguf does not exist" in fails("import", tmp_path / "nowhere.gguf", "--out", out, code=2)
    assert "SOURCE itself" in fails("import", model, "--out", model, code=2)
    assert "--dtype int3" in fails("import", file, "--out", out, "--dtype", "int3", code=2)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:20_000])
    assert "cut.gguf" in fails("import", cut, "--out", out, code=1)
    assert not out.exists()
