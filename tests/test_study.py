"""The study behind the defaults: its page says what its runs reached, and a run does what its arm says."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TINY = (
    "model.hidden_size=32",
    "data.vocab_size=300",
    "data.sequence_length=32",
    "trainer.max_steps=4",
    "trainer.batch_size=4",
    "trainer.limit_val_batches=1",
    "optim.warmup_steps=1",
    "loss.ramp_start=1",
    "loss.ramp_steps=2",
)


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "docs" / "study.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_runs_say(study: ModuleType) -> None:
    assert study.main(["--check"]) == 0


def test_every_arm_is_a_recipe(study: ModuleType, tmp_path: Path) -> None:
    for arm in study.ARMS:
        recipe = study.recipe_of(arm, "dialogues", 2, Path("data"), tmp_path)
        assert recipe.seed == 2
        assert recipe.data.source == "data/dialogues_train.jsonl.xz"
        assert (recipe.loss.teacher is not None) == arm.taught
        assert ("D" in recipe.family) == (arm.member is None and arm.name != study.ALONE)


def test_the_table_pairs_runs_of_a_seed(study: ModuleType) -> None:
    def members(full: float, alpha: float) -> dict[str, dict[str, float]]:
        one = {"loss": 3.5, "alpha": alpha, "match": 0.5}
        return {"XL": {"loss": full}, **dict.fromkeys("SLD", one)}

    runs = {
        (study.ALONE, "tinystories", seed): {"XL": {"loss": loss}} for seed, loss in enumerate((2.0, 4.0))
    }
    runs |= {("base", "tinystories", seed): members(full, 0.8) for seed, full in enumerate((2.02, 4.12))}
    table = study.table(runs, "tinystories")
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["base"]["against alone"] == "+2.0 ± 1.0 %"  # of 1 % and 3 %
    assert (rows["base"]["seeds"], rows["base"]["D alpha"], rows["base"]["D match"]) == (
        "2",
        "0.800",
        "0.500",
    )
    assert rows[study.ALONE]["D alpha"] == "-"


@pytest.mark.slow
def test_arms_are_trained_measured_and_written(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("train", "valid"):
        lines = [
            json.dumps({"text": f"{part} {n}: once upon a time there was a {n * n}. " * 8}) for n in range(60)
        ]
        (tmp_path / f"toy_{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    wanted = (study.ALONE, "base", "D alone", "D distilled")
    arms = [arm for arm in study.ARMS if arm.name in wanted]
    monkeypatch.setattr(
        study, "ARMS", [study.dataclasses.replace(a, overrides=(*TINY, *a.overrides)) for a in arms]
    )
    for name, value in {
        "SEEDS": range(1),
        "CORPORA": {"toy": "jsonl"},
        "RESULTS": tmp_path / "results",
    }.items():
        monkeypatch.setattr(study, name, value)
    options = ["--data", str(tmp_path), "--out", str(tmp_path / "runs")]
    assert study.main(options) == 0
    found = json.loads((tmp_path / "results" / "runs.json").read_text(encoding="utf-8"))
    members = {run["arm"]: run["members"] for run in found["runs"]}
    assert set(members["base"]) == {"S", "L", "D", "XL"}
    assert set(members["D distilled"]) == {"D"}
    assert 0 < members["D alone"]["D"]["alpha"] < 1
    assert {run["tokens"] for run in found["runs"]} == {4 * 4 * 32}
    page = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert all(f"| {name} | 1 |" in page for name in wanted)
    before = (tmp_path / "runs" / "toy" / "0" / "base.json").stat().st_mtime_ns
    assert study.main([*options, "--check"]) == 0, "what is done is not done again"
    assert (tmp_path / "runs" / "toy" / "0" / "base.json").stat().st_mtime_ns == before
    elsewhere = ["--data", str(tmp_path), "--out", str(tmp_path / "others"), "--arm", "base"]
    assert study.main(elsewhere) == 0
    assert not (tmp_path / "others" / "toy" / "0" / "D-alone.json").exists()
    again = json.loads((tmp_path / "results" / "runs.json").read_text(encoding="utf-8"))
    assert [run["arm"] for run in again["runs"]] == [run["arm"] for run in found["runs"]], "others stay"
