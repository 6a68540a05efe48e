"""`nestling machine`."""

import json
from pathlib import Path

import pytest

from train.cli import main


def test_the_machine_card_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machine", "--json", str(tmp_path / "m.json")]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["machine"]["cpu"]["dtypes"].keys() == {"fp32", "bf16", "fp16"}
    assert written["card"].keys() >= {
        "commit",
        "command",
        "date",
        "hardware",
        "threads",
        "dtypes",
        "versions",
    }
