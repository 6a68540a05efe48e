"""`nestling demo`, made small: everything lands, and it can be given again."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from models.base.errors import UsageError
from train.cli import main
from train.commands import demo_run
from train.commands.demo_run import RECIPE
from train.recipe.recipe import load_recipe, save_recipe

SMALL = [
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "data.max_documents=20",
    "data.valid_fraction=0.2",
    "data.sequence_length=64",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "trainer.limit_val_batches=1",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "tracking.wandb=disabled",
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, quick_machine: None) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "demo"
    results = folder.with_suffix(".json")
    assert main(["demo", "--out", str(folder), "--json", str(results), *SMALL]) == 0
    return folder


def test_everything_lands_in_one_folder(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "model", "S", "report.html"} <= names
    stock = AutoModelForCausalLM.from_pretrained(out / "S")
    assert stock.config.intermediate_size == load_recipe([RECIPE]).model.intermediate_size // 8


def test_the_results_say_that_the_draft_changed_nothing(out: Path) -> None:
    results = json.loads(out.with_suffix(".json").read_text())
    assert results["decoding"]["ids_equal"] is True
    assert results["extraction"]["ids_equal"] is True
    assert results["decoding"]["draft"] in {"S", "M", "L", "D", "E"}
    assert [member["name"] for member in results["members"]] == ["S", "M", "L", "D", "E", "XL"]


def test_given_again_it_starts_anew(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "model" / "model.safetensors").read_bytes()
    assert main(["demo", "--out", str(out), *SMALL, "seed=7"]) == 0
    assert "resuming" not in capsys.readouterr().out
    assert (out / "model" / "model.safetensors").read_bytes() != before


def test_a_slow_machine_trains_fewer_steps_and_an_interrupted_demo_keeps_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, whole = Console(quiet=True), load_recipe([RECIPE])
    monkeypatch.setattr(demo_run, "_seconds_per_step", lambda *_: 0.45)
    recipe, resume = demo_run.choose_recipe(tmp_path, [], console)
    assert (recipe.trainer.max_steps, resume) == (400, "never")
    assert recipe.loss.ramp_start * whole.trainer.max_steps == pytest.approx(
        whole.loss.ramp_start * recipe.trainer.max_steps, rel=0.01
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.setattr(demo_run, "_seconds_per_step", lambda *_: 0.001)
    assert demo_run.choose_recipe(tmp_path, [], console) == (recipe, "auto")
    assert demo_run.choose_recipe(tmp_path, ["seed=3"], console)[0].trainer == whole.trainer


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path), *SMALL]) == UsageError.exit_code
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
