"""`nestling train`: what is wrong is named and leaves nothing; a dry run makes nothing; a run lands whole."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from train.cli import main
from train.commands.train import default_out
from train.recipe.recipe import load_recipe

TINY = str(Path(__file__).parents[3] / "configs" / "tiny.yaml")
Fails = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["model.hiden_size=64"], "did you mean model.hidden_size?"),
        (["--model.hiden_size", "64"], "did you mean model.hidden_size?"),
        (["trainer.max_steps=many"], "trainer.max_steps=many: expected whole number"),
        (["sampler.row_fraction=1.5"], "sampler.row_fraction=1.5"),
        (["loss.divergence=euclid"], "loss.divergence=euclid"),
        (["family.S=ffn=2"], "ffn=2"),
        (["family.S=heads=0.3"], "heads=0.3"),
        (["family.S=layers=0:7"], "layer 7"),
        (["family.S=depth=2"], "depth=2"),
        (["model.num_attention_heads=5"], "num_attention_heads=5"),
        (["trainer.max_steps"], "trainer.max_steps"),
        (["--seed"], "--seed"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--config", "."], "--config ."),
        (["data.source=nowhere.txt"], "data.source='nowhere.txt'"),
        (["data.valid=nowhere.jsonl"], "data.valid='nowhere.jsonl'"),
        (["data.source="], "data.source"),
        (["data.source=''"], "data.source='' is empty; give"),
        (["data.valid=' '"], "data.valid=' ' is empty; give"),
        (["data.source=${"], "data.source=${: no viable alternative at input '${'; a value may refer"),
        (["data.source=${nope}"], "data.source=${nope}: Interpolation key 'nope' not found; a value"),
        (["trainer.max_steps=${trainer.max_steps}"], "trainer.max_steps=${trainer.max_steps}: Recursive"),
        (["trainer.accelerator=tpu"], "trainer.accelerator=tpu: there is none here; give one of auto, cpu"),
        (["trainer.accelerator=abacus"], "trainer.accelerator=abacus: there is none here"),
        (["trainer.accelerator=cpu", "trainer.devices=0"], "trainer.devices=0: expected a whole number"),
        (["trainer.accelerator=cpu", "trainer.devices=two"], "trainer.devices=two: expected"),
        (["trainer.accelerator=cpu", "trainer.devices='0,1'"], "trainer.devices=0,1: expected"),
        (["--dryrun"], "did you mean --dry-run?"),
        (["--confg=x.yaml"], "did you mean --config?"),
    ],
)
@pytest.mark.parametrize("flags", [["--dry-run"], ["--out", "run"]], ids=["dry", "wet"])
def test_a_wrong_recipe_is_named_and_leaves_nothing(
    arguments: list[str],
    named: str,
    flags: list[str],
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in fails("train", "--config", TINY, *flags, *arguments, code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_in_a_file_is_named_with_its_key(tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "recipe.yaml"
    for value in ("${nope}", "${"):
        path.write_text(f'data:\n  source: "{value}"\n')
        line = fails("train", "--config", path, "--dry-run", code=2)
        assert str(path) in line
        assert "data.source" in line


def test_a_recipe_that_is_no_yaml_is_named(tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: [unclosed")
    assert str(path) in fails("train", "--config", path, code=2)


@pytest.mark.parametrize("resume", ["maybe", "steps/00000007"])
def test_a_state_that_is_not_there_is_named(resume: str, tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / "run"
    line = fails("train", "--config", TINY, "--out", out, "--resume", resume, code=2)
    assert f"--resume {resume}" in line
    assert not out.exists()


def test_several_mistakes_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "model.hiden_size=64", "trainer.max_steps=many"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "hiden_size" in lines[0]
    assert "max_steps=many" in lines[1]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_corpus_is_named_and_leaves_nothing(text: str, tmp_path: Path, fails: Fails) -> None:
    empty, out = tmp_path / "empty.txt", tmp_path / "run"
    empty.write_text(text)
    command = ["train", "--config", TINY, "--out", out, "trainer.max_steps=1"]
    assert "empty.txt" in fails(*command, f"data.source={empty}", code=1)
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    ["trainer.max_steps=7 --seed 3", "--trainer.max_steps=7 seed=3", "--trainer.max_steps 7 --seed=3"],
)
def test_a_dry_run_shows_recipe_and_cost_for_every_form_of_override_and_makes_nothing(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["train", *words.split(), "--config", TINY, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "max_steps: 7" in out
    assert "seed: 3" in out
    assert "hidden_size: 64" in out, "the file's own settings"
    for told in ("106,944", "155,968", "217,536", "3,584 in 7 steps", "MiB", "GFLOP/s"):
        assert told in out, told
    assert out.index("max_steps: 7") < out.index("GFLOP/s"), "the recipe is long: what it costs is seen last"
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in made} <= {".so"}, "the compiled step is kept, nothing else"


def test_a_run_lands_whole(run: Path) -> None:
    assert {"recipe.yaml", "metrics.jsonl", "steps", "model"} <= {path.name for path in run.iterdir()}
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "valid", "sample"} <= set(kinds)


def test_a_finished_run_given_again_trains_no_further(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", "--config", TINY, "--out", str(run), "dtype=fp32"]) == 0
    out = capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before
    assert "218k" in out
    assert f"nestling generate {run / 'model'}" in out


def test_another_recipe_does_not_go_on_in_the_same_folder(run: Path, fails: Fails) -> None:
    before = (run / "recipe.yaml").read_text()
    line = fails("train", "--config", TINY, "--out", run, "dtype=fp32", "optim.lr=0.5", code=2)
    assert f"--out {run}" in line
    assert (run / "recipe.yaml").read_text() == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert str(tmp_path) in fails("train", "--config", TINY, "--out", tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_dry_run_of_a_giant_batch_answers_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert main(["train", "--config", TINY, "trainer.batch_size=1000000000", "--dry-run"]) == 0
    assert time.process_time() - started < 15
    assert "memory" in capsys.readouterr().out


def test_the_run_folder_is_named_after_the_recipe() -> None:
    recipe = load_recipe([Path(TINY)])
    assert default_out(recipe, [Path("base.yaml"), Path(TINY)]) == Path("checkpoints/tiny")
    named = load_recipe([Path(TINY)], ["tracking.name=mine"])
    assert default_out(named, [Path(TINY)]) == Path("checkpoints/mine")


def test_a_path_of_the_data_that_is_not_utf8_is_refused_before_anything_is_made(
    tmp_path: Path, fails: Fails
) -> None:
    source = f"data.source={os.fsdecode(b'caf' + bytes([0xE9]))}/text.txt"
    line = fails("train", "--config", TINY, source, "--out", tmp_path / "run", code=2)
    assert "data.source='caf\\udce9/text.txt': is not UTF-8" in line
    assert not (tmp_path / "run").exists()
