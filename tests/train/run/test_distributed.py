"""Several processes train as one does: real ones, over gloo, started as a user would start them."""

import contextlib
import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from models.base.errors import UsageError
from models.base.files import read_json
from models.checkpoint.folder import load_model
from train.data.batch import Batch
from train.objective.joint_loss import JointLoss, joint_loss
from train.recipe.recipe import Recipe, load_recipe, save_recipe
from train.recipe.sections import TrainerConfig
from train.run.distributed import make_fabric
from train.run.fit import fit
from train.run.metrics import read_metrics
from train.run.state import newest_state

ROOT = Path(__file__).parents[3]
DOOR = "from train.cli import main\nraise SystemExit(main())\n"
BROKEN_DOOR = f"""import pytest
from tests.train.run.test_distributed import break_steps
break_steps(pytest.MonkeyPatch())
{DOOR}"""
PATIENCE = 1800
"""Seconds that two processes may need on a busy machine."""
LOSS_TOLERANCE = 1e-5
"""Relative. Gradients are added up in another order, and AdamW divides by their roots: after 8 steps at a
learning rate of 0.01 the curves differ by some 1e-6."""
GRADIENT_TOLERANCE = 1e-4
"""For norms and cosines of gradients, which follow the weights more closely than a loss near its least does;
a cosine is a sum of products of both signs besides."""
WEIGHT_TOLERANCE = 1e-3
"""Absolute: a tenth of one step's largest change. Where a gradient is nearly 0, AdamW follows its sign."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog"]
    picks = torch.randint(0, len(words), (60, 80), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("\n<|endoftext|>\n".join(" ".join(words[i] for i in row) for row in picks))
    return path


def make_recipe(text: Path, *overrides: str) -> Recipe:
    settings = {
        "model.hidden_size": 32,
        "model.intermediate_size": 64,
        "model.num_hidden_layers": 3,
        "model.num_attention_heads": 4,
        "model.num_key_value_heads": 2,
        "family": "{S: ffn=0.25, H: heads=0.5, D: layers=0, E: 'layers=0:2'}",
        "data.source": text,
        "data.cache_dir": text.parent / "cache",
        "data.vocab_size": 300,
        "data.sequence_length": 32,
        "data.valid_fraction": 0.1,
        "loss.divergence": "forward_kl",
        "loss.ramp_start": 2,
        "loss.ramp_steps": 3,
        "optim.lr": 0.01,
        "optim.warmup_steps": 2,
        "trainer.max_steps": 8,
        "trainer.batch_size": 8,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.checkpoint_every": 2,
        "trainer.keep_checkpoints": 9,
        "trainer.accelerator": "cpu",
        "tracking.wandb": "disabled",
        "tracking.tensorboard": "false",
        "dtype": "fp32",
    }
    return load_recipe(overrides=[*(f"{key}={value}" for key, value in settings.items()), *overrides])


def break_steps(patch: pytest.MonkeyPatch) -> None:
    """Make the fifth to seventh batch of the last process one whose loss is not finite."""
    calls = itertools.count(1)

    def faulty(model: Any, members: Any, batch: Batch, *rest: Any, **named: Any) -> JointLoss:
        bad = next(calls) in (5, 6, 7) and batch.first_row == batch.stride - 1
        total, terms = joint_loss(model, members, batch, *rest, **named)
        factor = math.nan if bad else 1.0
        return JointLoss(total * factor, {name: term * factor for name, term in terms.items()})

    patch.setattr("train.run.module.joint_loss", faulty)


def start_two(
    recipe: Recipe, folder: Path, strategy: str, *, torchrun: bool, door: str = DOOR
) -> subprocess.Popen[str]:
    """Two processes that train into `folder/run`, started by Lightning or by torchrun."""
    save_recipe(recipe, folder / "given.yaml")
    (folder / "door.py").write_text(door)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
    words = f"train --config {folder / 'given.yaml'} --out {folder / 'run'} trainer.devices=2"
    return subprocess.Popen(
        [sys.executable, *launcher, str(folder / "door.py"), *words.split(), f"trainer.strategy={strategy}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": str(free_port())},
    )


def free_port() -> int:
    """Return a port that is free and stays so: the system gives none below 32768 to who asks for any.

    Each process has twenty of its own: one that probes would take what another has chosen and not opened yet.
    """
    first = 20_000 + 20 * (os.getpid() % 500)
    for port in range(first, first + 20):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no port is free")


def forget_after(run: Path, step: int) -> None:
    """Make a finished run one that was killed after a step."""
    shutil.rmtree(run / "model", ignore_errors=True)
    for folder in (run / "steps").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)


def compare(ours: Path, theirs: Path) -> None:
    """Curves, states and the measured family of two runs, but for rounding and clocks."""
    for our_line, their_line in zip(
        read_metrics(ours / "metrics.jsonl"), read_metrics(theirs / "metrics.jsonl"), strict=True
    ):
        our_curve, their_curve = curve(our_line), curve(their_line)
        assert our_curve.keys() == their_curve.keys()
        for name, value in our_curve.items():
            tolerance = GRADIENT_TOLERANCE if name.startswith("gradient") else LOSS_TOLERANCE
            assert value == pytest.approx(their_curve[name], rel=tolerance, abs=tolerance), name
    assert steps(ours) == steps(theirs)
    for file in ("model.safetensors", "owned.safetensors", "optimizer.safetensors"):
        our_tensors = load_file(ours / "steps" / "00000008" / file)
        their_tensors = load_file(theirs / "steps" / "00000008" / file)
        torch.testing.assert_close(our_tensors, their_tensors, rtol=0, atol=WEIGHT_TOLERANCE)


def curve(line: dict[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    # a match is a count of equal argmaxes: it jumps
    clocks = ("seconds", "tokens_per_second", "mfu", "data_wait")
    return {key: value for key, value in numbers.items() if key not in clocks and "match" not in key}


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "steps").iterdir())


SLOW = [
    pytest.param(strategy, ("rows", "2"), id=f"{strategy}-accumulated", marks=pytest.mark.slow)
    for strategy in ("ddp", "fsdp")
] + [
    pytest.param(strategy, (kind, "1"), id=f"{strategy}-{kind}", marks=pytest.mark.slow)
    for strategy in ("ddp", "fsdp")
    for kind in ("rows", "random", "sandwich", "all")
    if (strategy, kind) != ("ddp", "rows")
]


@pytest.mark.parametrize(("strategy", "sampler"), [pytest.param("ddp", ("rows", "1"), id="ddp-rows"), *SLOW])
def test_two_processes_go_on_from_one_and_one_from_two_as_if_nothing_had_changed(
    text: Path, tmp_path: Path, strategy: str, sampler: tuple[str, str]
) -> None:
    """Steps 1-2 by one process, 3-8 by two, then 5-8 again by one; all against one process alone."""
    kind, accumulate = sampler
    recipe = make_recipe(
        text,
        f"sampler.kind={kind}",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.batch_size={8 // int(accumulate)}",
        "owned.norms=true",
        "owned.rank=2",
        "family.H=ffn=0.5,heads=0.5",
        "optim.outer_lr_ratio=0.5",
    )
    alone, mixed = tmp_path / "alone", tmp_path / "run"
    fit(recipe, alone, console=Console(quiet=True))

    shutil.copytree(alone, mixed)
    forget_after(mixed, 2)
    process = start_two(recipe, tmp_path, strategy, torchrun=strategy == "fsdp")
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert output.count("resuming at step 2 of 8") == 1, "the first process alone speaks"
    compare(mixed, alone)
    ours, theirs = (load_model(run / "model").members for run in (mixed, alone))
    assert [one.loss for one in ours] == pytest.approx([one.loss for one in theirs], rel=LOSS_TOLERANCE)

    forget_after(mixed, 4)
    fit(recipe, mixed, console=Console(quiet=True))
    compare(mixed, alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_process_has_the_whole_teacher(text: Path, tmp_path: Path, strategy: str) -> None:
    fit(make_recipe(text), tmp_path / "teacher", console=Console(quiet=True))
    recipe = make_recipe(text, "seed=1", f"loss.teacher={tmp_path / 'teacher' / 'model'}")
    fit(recipe, tmp_path / "alone", console=Console(quiet=True))
    process = start_two(recipe, tmp_path, strategy, torchrun=False)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    compare(tmp_path / "run", tmp_path / "alone")


WRITTEN = (  # with a seed of which no gradient is so near 0 that rounding decides AdamW's direction
    "seed=2 distill.written_fraction=0.5 distill.prompt_tokens=4 distill.replay_steps=4 "
    "owned.norms=true loss.ramp_start=0 loss.ramp_steps=0"
)
CACHED = "distill.cache={folder}/cache"
OWNED = "model.train=owned owned.rank=2"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        pytest.param("loss.teacher", WRITTEN, id="rows that the student writes"),
        pytest.param("loss.teacher", CACHED, id="a cache", marks=pytest.mark.slow),
        pytest.param("model.from", OWNED, id="owned weights alone", marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_from_a_given_model_as_one_does(
    text: Path, tmp_path: Path, key: str, words: str
) -> None:
    """Members take turns; what is written, cached or owned is the same in both processes."""
    schedule = ["trainer.max_steps=8", "trainer.checkpoint_every=8", "trainer.val_check_interval=8"]
    fit(make_recipe(text, *schedule), tmp_path / "given", console=Console(quiet=True))
    more = words.format(folder=tmp_path) if words == CACHED else words
    given = f"{key}={tmp_path / 'given' / 'model'}"
    recipe = make_recipe(text, "seed=1", given, *more.split(), *schedule)
    fit(recipe, tmp_path / "alone", console=Console(quiet=True))
    process = start_two(recipe, tmp_path, "ddp", torchrun=False)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    compare(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_steps_that_are_bad_in_one_process_are_skipped_by_all_and_take_all_back(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    recipe = make_recipe(text, "trainer.checkpoint_every=4")
    process = start_two(recipe, tmp_path, strategy, torchrun=False, door=BROKEN_DOOR)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert output.count("skipped before step 7; back to step 4") == 1, "the first process alone decides"
    break_steps(monkeypatch)
    fit(recipe, tmp_path / "alone", console=Console(quiet=True))
    compare(tmp_path / "run", tmp_path / "alone")
    for run in (tmp_path / "run", tmp_path / "alone"):
        assert read_json(run / "steps/00000008/state.json")["rows"] == (8 + 3) * recipe.trainer.rows_per_step
        assert load_model(run / "model").provenance["skipped_steps"] == 3
        assert load_model(run / "model").provenance["rollbacks"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    text: Path, tmp_path: Path, strategy: str
) -> None:
    recipe = make_recipe(text, "trainer.max_steps=1000000", "trainer.val_check_interval=1000000")
    process = start_two(recipe, tmp_path, strategy, torchrun=False)
    deadline = time.monotonic() + PATIENCE
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE)  # pipes end when the last process has
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    state, damaged = newest_state(tmp_path / "run" / "steps")
    assert state is not None
    assert damaged == []
    assert state.step == max(line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert f"stopped after step {state.step}" in output


def test_rows_that_processes_cannot_share_evenly_are_refused() -> None:
    settings = TrainerConfig(accelerator="cpu", devices=3, batch_size=16)
    with pytest.raises(UsageError, match=r"trainer\.batch_size=16: 3 processes .* a multiple of 3"):
        make_fabric(settings)
