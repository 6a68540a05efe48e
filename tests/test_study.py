"""The study behind the defaults: its page says what its runs reached, and a run does what its arm says."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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
def study() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))  # as `python docs/study.py` does
        yield importlib.import_module("study")


def arms_of(study: ModuleType) -> ModuleType:
    return sys.modules[study.Arm.__module__]


def page_of(study: ModuleType) -> ModuleType:
    return sys.modules[study.files.__module__]


def test_the_page_is_what_the_runs_say(study: ModuleType) -> None:
    assert study.main(["--check"]) == 0


def test_a_family_may_be_done_before_the_model_that_it_is_compared_with(study: ModuleType) -> None:
    members = {name: {"loss": 2.0, "alpha": 0.5} for name in ("S", "L", "D", "XL")}
    run = study.Run("even", "dialogues", 0, 900)
    pages = study.files({"command": "-", "card": {}, "runs": [{**run._asdict(), "members": members}]})
    page = pages[page_of(study).RESULTS / "README.md"]
    assert "| even | 1 | 2.000 | - |" in page


def test_every_arm_is_a_recipe(study: ModuleType, tmp_path: Path) -> None:
    for arm in study.ARMS:
        recipe = study.recipe_of(arm, study.Run(arm.name, "dialogues", 2), Path("data"), tmp_path)
        assert recipe.seed == 2
        assert recipe.data.source == "data/dialogues_train.jsonl.xz"
        assert (recipe.loss.teacher is not None) == arm.taught
        assert ("D" in recipe.family) == (arm.member is None and arm.name != study.ALONE)
        assert (recipe.trainer.max_steps < study.SHORT) == arm.extra


def test_a_longer_run_warms_up_and_ramps_in_proportion(study: ModuleType, tmp_path: Path) -> None:
    arm = study.ARMS[0]
    run = study.Run(arm.name, "dialogues", 0, 2 * study.SHORT)
    long, short = (
        study.recipe_of(arm, one, Path("data"), tmp_path) for one in (run, run._replace(steps=450))
    )
    assert long.trainer.max_steps == 2 * short.trainer.max_steps
    assert long.optim.warmup_steps == 2 * short.optim.warmup_steps
    assert (long.loss.ramp_start, long.loss.ramp_steps) == (
        2 * short.loss.ramp_start,
        2 * short.loss.ramp_steps,
    )
    assert run.folder(tmp_path) != run._replace(steps=450).folder(tmp_path)


def test_the_extra_time_buys_fewer_steps_of_what_costs_more(study: ModuleType, tmp_path: Path) -> None:
    steps = {
        arm.name: study.recipe_of(
            arm, study.Run(arm.name, "dialogues", 0), Path("data"), tmp_path
        ).trainer.max_steps
        for arm in study.ARMS
        if arm.extra
    }
    assert 0 < steps["S distilled in the extra time"] < steps["S alone in the extra time"] < study.SHORT / 3


def test_the_table_pairs_runs_of_a_seed(study: ModuleType) -> None:
    def members(full: float, alpha: float) -> dict[str, dict[str, float]]:
        one = {"loss": 3.5, "alpha": alpha, "match": 0.5}
        return {"XL": {"loss": full}, **dict.fromkeys("SLD", one)}

    run = study.Run("base", "tinystories", 0)
    runs = {
        run.of(study.ALONE)._replace(seed=seed): {"members": {"XL": {"loss": loss}}}
        for seed, loss in enumerate((2.0, 4.0))
    }
    runs |= {
        run._replace(seed=seed): {"members": members(full, 0.8)} for seed, full in enumerate((2.02, 4.12))
    }
    table = page_of(study).table(runs, {"base": 1.25})
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["base"]["against alone"] == "+2.0 ± 1.0 %"  # of 1 % and 3 %
    assert rows["base"]["time"] == "1.25x"
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
    arms = [
        dataclasses.replace(arm, overrides=(*TINY, *arm.overrides))
        for arm in study.ARMS
        if arm.name in wanted
    ]
    changed: dict[str, Any] = {
        "ARMS": arms,
        "SEEDS": range(1),
        "CORPORA": {"toy": arms_of(study).Corpus("toy", "jsonl")},
    }
    changed |= {"SHORT_CORPORA": ("toy",), "RESULTS": tmp_path / "results"}
    for module in (study, arms_of(study), page_of(study)):
        for name in set(changed) & set(vars(module)):
            monkeypatch.setattr(module, name, changed[name])
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
