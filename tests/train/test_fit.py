import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from models.checkpoint import load_model
from models.errors import UsageError
from train.fit import fit
from train.metrics import read_metrics
from train.recipe import Recipe, load_recipe

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "dog",
    "run",
    "to",
    "its",
    "small",
    "house",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (60, 80), generator=generator).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(" ".join(WORDS[i] for i in row) for row in picks))
    return path


def make_recipe(text: Path, *overrides: str) -> Recipe:
    settings = {
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "model.num_hidden_layers": 3,
        "model.num_attention_heads": 4,
        "model.num_key_value_heads": 2,
        "family": "{S: ffn=0.25, D: layers=0}",
        "data.source": text,
        "data.cache_dir": text.parent / "cache",
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.valid_fraction": 0.1,
        "loss.ramp_start": 2,
        "loss.ramp_steps": 3,
        "optim.lr": 0.01,
        "optim.warmup_steps": 2,
        "trainer.max_steps": 8,
        "trainer.batch_size": 4,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 2,
        "trainer.checkpoint_every": 4,
        "trainer.accelerator": "cpu",
        "tracking.wandb": "disabled",
        "tracking.tensorboard": "false",
        "dtype": "fp32",
    }
    return load_recipe(overrides=[*(f"{key}={value}" for key, value in settings.items()), *overrides])


def run(recipe: Recipe, out: Path, resume: str = "auto") -> Path:
    return fit(recipe, out, resume=resume, console=Console(quiet=True))


def without_clocks(path: Path) -> list[dict[str, Any]]:
    clocks = {"seconds", "tokens_per_second", "data_wait"}
    return [{key: value for key, value in line.items() if key not in clocks} for line in read_metrics(path)]


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(make_recipe(text), out)
    return out


def test_a_run_leaves_its_recipe_metrics_states_and_a_measured_family(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "metrics.jsonl",
        "model",
        "recipe.yaml",
        "steps",
    ]
    folder = load_model(finished / "model")
    assert [member.name for member in folder.members] == ["S", "D", "XL"]
    assert all(member.loss and member.alpha for member in folder.members)
    assert folder.tokenizer is not None
    assert folder.provenance["steps"] == 8
    assert load_recipe([finished / "recipe.yaml"]).trainer.max_steps == 8
    assert sorted(path.name for path in (finished / "steps").iterdir()) == ["00000004", "00000008"]


def test_metrics_tell_of_every_member_and_the_loss_falls(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 6, 8]
    assert [line["tokens"] for line in train] == [256, 512, 768, 1024]
    assert {"loss/XL", "loss/S", "loss/D", "lr", "gradient_norm", "tokens_per_second"} <= set(train[0])
    assert train[-1]["loss/XL"] < train[0]["loss/XL"] - 0.1
    valid = [line for line in lines if line["kind"] == "valid"]
    assert [line["step"] for line in valid] == [4, 8]
    assert valid[-1]["valid/XL/loss"] < valid[0]["valid/XL/loss"]
    assert 0 < valid[-1]["valid/D/alpha"] < 1
    assert {line["member"] for line in lines if line["kind"] == "sample"} == {"S", "D", "XL"}


QUICK = [("rows", 1, 0), ("rows", 4, 0)]
SLOW = [
    case
    for case in itertools.product(["rows", "all", "random", "sandwich"], [1, 4], [0, 2])
    if case not in QUICK
]


@pytest.mark.parametrize(
    ("kind", "accumulate", "num_workers"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_a_run_killed_and_resumed_equals_the_run_never_killed(
    text: Path, tmp_path: Path, kind: str, accumulate: int, num_workers: int
) -> None:
    """Law 7: weights, optimizer and metrics, bit for bit; killed after step 6, saved last at 4."""
    recipe = make_recipe(
        text,
        f"sampler.kind={kind}",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.batch_size={4 // accumulate}",
        f"data.num_workers={num_workers}",
    )
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "steps" / "00000008")
    shutil.rmtree(tmp_path / "killed" / "model")
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    seen = [line for line in lines if json.loads(line)["step"] <= 6]
    (tmp_path / "killed" / "metrics.jsonl").write_text("\n".join(seen) + '\n{"kind": "tra')
    run(recipe, tmp_path / "killed")
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours = load_file(tmp_path / "killed" / "steps" / "00000008" / file)
        theirs = load_file(tmp_path / "whole" / "steps" / "00000008" / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_clocks(tmp_path / "killed" / "metrics.jsonl") == without_clocks(
        tmp_path / "whole" / "metrics.jsonl"
    )


def test_a_finished_run_trains_no_further(text: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    run(make_recipe(text), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_with_another_recipe_is_not_mixed_up(text: Path, finished: Path) -> None:
    with pytest.raises(UsageError, match=r"another model and seed section.*--resume never"):
        run(make_recipe(text, "seed=1", "model.num_hidden_layers=2"), finished)


def test_resume_never_starts_anew(text: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    run(make_recipe(text, "seed=1", "trainer.max_steps=4"), out, resume="never")
    assert [path.name for path in sorted((out / "steps").iterdir())] == ["00000000", "00000004"]
    assert max(line["step"] for line in read_metrics(out / "metrics.jsonl")) == 4


def test_a_folder_that_is_no_run_is_left_alone(text: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match="not ours to replace"):
        run(make_recipe(text), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
