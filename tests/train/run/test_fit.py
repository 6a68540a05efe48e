import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from models.base.errors import NestlingError, UsageError
from models.base.files import read_json
from models.checkpoint.folder import load_model
from models.decode.tune.predict import best_speedup
from models.elastic.count import count_flops
from models.machine.card import measure_card, this_machine
from train.data.batch import Batch
from train.data.module import TextData
from train.objective.flops import count_step_flops
from train.objective.joint_loss import JointLoss, joint_loss
from train.recipe.recipe import Recipe, load_recipe
from train.run.fit import fit
from train.run.lock import RunLock
from train.run.metrics import read_metrics


@pytest.fixture(scope="module")
def text(write_words: Callable[[int], Path]) -> Path:
    return write_words(80)


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
        "sampler.row_fraction": 0.25,
        "sampler.min_rows": 1,
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
    clocks = {"seconds", "tokens_per_second", "mfu", "data_wait"}
    return [{key: value for key, value in line.items() if key not in clocks} for line in read_metrics(path)]


def assert_equal_at(step: int, ours: Path, theirs: Path) -> None:
    """Weights, moments, counters and metrics of two runs, bit for bit."""
    states = [run / "steps" / f"{step:08d}" for run in (ours, theirs)]
    names = [sorted(path.name for path in state.glob("*.safetensors")) for state in states]
    assert names[0] == names[1]
    for file in names[0]:
        a, b = (load_file(state / file) for state in states)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert read_json(states[0] / "state.json") == read_json(states[1] / "state.json")
    assert without_clocks(ours / "metrics.jsonl") == without_clocks(theirs / "metrics.jsonl")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(make_recipe(text), out)
    return out


def test_a_second_run_in_the_same_folder_is_refused_at_once(text: Path, finished: Path) -> None:
    with RunLock(finished) as lock:
        lock.take()
        with pytest.raises(UsageError, match="another run is writing to this folder"):
            run(make_recipe(text), finished)


def test_a_run_leaves_its_recipe_metrics_states_and_a_measured_family(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "data.json",
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


def test_the_promised_speed_follows_from_alpha_and_the_members_operations(finished: Path) -> None:
    folder = load_model(finished / "model")
    valid = [line for line in read_metrics(finished / "metrics.jsonl") if line["kind"] == "valid"]
    for name in ("S", "D"):
        cost = count_flops(folder.model.config, folder.family[name]) / count_flops(folder.model.config)
        expected = best_speedup(valid[-1][f"valid/{name}/alpha"], cost)
        assert valid[-1][f"valid/{name}/speedup"] == pytest.approx(expected)


def test_comparing_gradients_leaves_the_run_as_it_was(
    text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.run.callbacks.gradients.Gradients.on_step", lambda *_: None)
    run(make_recipe(text), tmp_path / "without")
    kinds = {line["kind"] for line in read_metrics(tmp_path / "without" / "metrics.jsonl")}
    assert kinds == {"train", "valid", "sample"}
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (
            load_file(path / "steps" / "00000008" / file) for path in (finished, tmp_path / "without")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("busy", [False, True])
def test_utilisation_is_a_share_of_the_measured_rate_if_there_is_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    card = replace(measure_card(this_machine(), num_matrices=1, budget=0.0), busy=busy)
    monkeypatch.setattr("train.run.speed.known_card", lambda: card)
    recipe = make_recipe(text, "trainer.max_steps=2", "trainer.accumulate_grad_batches=2")
    model = load_model(run(recipe, tmp_path / "run")).model
    (line,) = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train")
    assert ("mfu" in line) is not busy
    if not busy:
        tokens = 2 * 4 * 32  # of a step
        flops = line["tokens_per_second"] / tokens * count_step_flops(recipe, model.config)
        assert line["mfu"] == pytest.approx(flops / (card.cpu.dtypes["fp32"].product_gflops * 1e9))


def test_the_last_step_has_a_line_in_any_case(text: Path, tmp_path: Path) -> None:
    run(make_recipe(text, "trainer.max_steps=5", "trainer.val_check_interval=9"), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 5]


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
    assert {key for key in valid[-1] if "speedup" in key} == {"valid/S/speedup", "valid/D/speedup"}
    pulls = [line for line in lines if line["kind"] == "gradient"]
    assert [(line["step"], line["tokens"]) for line in pulls] == [(4, 512), (8, 1024)]
    measured = {key: value for key, value in pulls[-1].items() if key.startswith("gradient/")}
    norms = {f"gradient/{name}/norm" for name in ("S", "D", "XL")}
    assert set(measured) == {*norms, "gradient/S/cosine", "gradient/D/cosine"}
    assert all(value > 0 for key, value in measured.items() if key.endswith("norm"))
    assert {line["member"] for line in lines if line["kind"] == "sample"} == {"S", "D", "XL"}


OWNED = (
    "owned.norms=true",
    "owned.rank=2",
    "loss.narrow_gradient=0.3",
    "loss.hidden_weight=6",
    "optim.outer_lr_ratio=0.5",
)
QUICK = [("rows", 1, 0), ("rows", 4, 0)]
SLOW = [
    case
    for case in itertools.product(["rows", "all", "random", "sandwich"], [1, 4], [0, 2])
    if case not in QUICK
]


@pytest.mark.parametrize(
    ("kind", "accumulate", "num_workers", "beside"),
    [
        *((*case, "") for case in QUICK),
        ("rows", 1, 0, "a teacher"),
        ("rows", 1, 0, "owned weights"),
        *(pytest.param(*case, "", marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_a_run_killed_and_resumed_equals_the_run_never_killed(
    text: Path, tmp_path: Path, finished: Path, kind: str, accumulate: int, num_workers: int, beside: str
) -> None:
    """Invariant 7: weights, optimizer and metrics, bit for bit; killed after step 6, saved last at 4."""
    recipe = make_recipe(
        text,
        f"sampler.kind={kind}",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.batch_size={4 // accumulate}",
        f"data.num_workers={num_workers}",
        *([f"loss.teacher={finished / 'model'}"] if beside == "a teacher" else []),
        *(OWNED if beside == "owned weights" else []),
    )
    run(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "steps" / "00000008")
    shutil.rmtree(tmp_path / "killed" / "model")
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    seen = [line for line in lines if json.loads(line)["step"] <= 6]
    (tmp_path / "killed" / "metrics.jsonl").write_text("\n".join(seen) + '\n{"kind": "tra')
    run(recipe, tmp_path / "killed")
    assert_equal_at(8, tmp_path / "killed", tmp_path / "whole")


def test_members_learn_weights_of_their_own(text: Path, tmp_path: Path) -> None:
    folder = load_model(run(make_recipe(text, *OWNED), tmp_path / "run"))
    owned = {one.name: one for one in folder.model.members}
    assert owned.keys() == {"S", "D"}
    full = dict(folder.model.model.named_parameters())
    for one in owned.values():
        for name, parameter in one.named_parameters():
            assert not torch.equal(parameter, full.get(name, torch.zeros_like(parameter))), name
    assert {one.name: one.owned_bytes for one in folder.members} == {
        **{name: one.num_bytes for name, one in owned.items()},
        "XL": 0,
    }


def test_a_run_with_a_teacher_leaves_it_alone_and_tells_of_it(
    text: Path, tmp_path: Path, finished: Path
) -> None:
    teacher, student = finished / "model", tmp_path / "student"
    weights = (teacher / "model.safetensors").read_bytes()
    small = ("model.num_hidden_layers=1", "family={}", f"loss.teacher={teacher}")
    run(make_recipe(text, *small), student)
    assert (teacher / "model.safetensors").read_bytes() == weights
    ours, theirs = load_model(student / "model"), load_model(teacher)
    told = {"path": str(teacher), "sha256": hashlib.sha256(weights).hexdigest()}
    assert ours.provenance["teacher"] == read_json(student / "teacher.json") == told
    assert ours.tokenizer is not None
    assert theirs.tokenizer is not None
    assert ours.tokenizer.to_str() == theirs.tokenizer.to_str()
    assert theirs.provenance["teacher"] is None
    state = load_file(student / "steps/00000008/model.safetensors")
    assert state.keys() == dict(ours.model.named_parameters()).keys()
    run(make_recipe(text, *small[:-1], f"data.tokenizer={teacher}"), tmp_path / "alone")
    alone = load_file(tmp_path / "alone/steps/00000008/model.safetensors")
    assert not all(torch.equal(alone[name], state[name]) for name in state)


def test_a_run_does_not_go_on_with_another_teacher(text: Path, tmp_path: Path, finished: Path) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(finished / "model", teacher)
    recipe = make_recipe(text, f"loss.teacher={teacher}", "trainer.max_steps=4")
    run(recipe, out)
    with pytest.raises(UsageError, match=r"loss\.teacher=.*teacher \(now .*model\)"):
        run(make_recipe(text, f"loss.teacher={finished / 'model'}"), out)
    shutil.copy(finished / "steps/00000004/model.safetensors", teacher)
    metrics = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=rf"loss\.teacher={teacher}: has other weights.*--resume never"):
        run(recipe, out)
    assert (out / "metrics.jsonl").read_bytes() == metrics
    run(recipe, out, resume="never")
    run(recipe, out)


@pytest.mark.parametrize("place", ["train.run.run_folder.save_recipe", "train.run.run_folder.write_json"])
def test_a_run_killed_before_its_teacher_is_recorded_can_be_started_again(
    text: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    recipe = make_recipe(text, f"loss.teacher={finished / 'model'}", "trainer.max_steps=1")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "teacher.json").is_file()


def test_a_finished_run_trains_no_further(text: Path, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    run(make_recipe(text), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_folder_with_another_recipe_is_not_mixed_up(text: Path, finished: Path) -> None:
    with pytest.raises(
        UsageError, match=r"model\.num_hidden_layers=3 \(now 2\), seed=0 \(now 1\).*--resume never"
    ):
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


# ---------------------------------------------------------------- steps that do harm


class Faults:
    """Multiplies the loss of some data by a factor: faults that come with the data, whoever reads them.

    Places are steps of a run that never went back; `read` holds the place of each step's first batch.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
        loader = TextData(recipe).prepare().train_dataloader()
        micros = range(recipe.trainer.accumulate_grad_batches)
        batches = {(place, micro): loader.batch(place, micro) for place in range(40) for micro in micros}
        self.places = {key(batch): where for where, batch in batches.items()}
        self.factors: dict[int, float] = {}
        self.read: list[tuple[int, int]] = []
        monkeypatch.setattr("train.run.module.joint_loss", self.joint_loss)

    def set(self, places: Iterable[int], factor: float = float("nan")) -> None:
        self.factors = dict.fromkeys(places, factor)

    def joint_loss(self, model: Any, members: Any, batch: Batch, *rest: Any, **named: Any) -> JointLoss:
        place, micro = self.places[key(batch)]
        if micro == 0:
            self.read.append((batch.step, place))
        factor = self.factors.get(place, 1.0) if micro == 0 else 1.0
        loss = joint_loss(model, members, batch, *rest, **named)
        return JointLoss(loss.total * factor, {name: term * factor for name, term in loss.terms.items()})


def key(batch: Batch) -> bytes:
    return batch.tokens_BT.numpy().tobytes()


def cut_back(whole: Path, out: Path, step: int) -> Path:
    """A copy as it was when the state of a step was the newest."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    for state in (out / "steps").iterdir():
        if int(state.name) > step:
            shutil.rmtree(state)
    return out


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    recipe = make_recipe(
        text,
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=9",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.batch_size={4 // accumulate}",
    )
    Faults(monkeypatch, recipe).set([5])
    run(recipe, tmp_path / "whole")
    before, after = (tmp_path / "whole" / "steps" / f"{step:08d}" for step in (5, 6))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (before / file).read_bytes() == (after / file).read_bytes()
    lines = {
        line["step"]: line for line in read_metrics(tmp_path / "whole/metrics.jsonl") if "skipped" in line
    }
    assert {step: line["skipped"] for step, line in lines.items()} == {2: 0, 4: 0, 6: 1, 8: 1}
    assert lines[6]["gradient_norm"] is None
    assert lines[8]["gradient_norm"] > 0
    run(recipe, cut_back(tmp_path / "whole", tmp_path / "killed", 5))
    assert_equal_at(8, tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(("sigma", "skipped"), [("6", 1), ("0", None)])
def test_a_step_that_leaps_is_skipped_once_the_usual_is_known(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sigma: str, skipped: int | None
) -> None:
    monkeypatch.setattr("train.run.skip_steps.WARM_UP", 3)
    recipe = make_recipe(text, f"optim.skip_sigma={sigma}")
    Faults(monkeypatch, recipe).set([5], 1e6)
    run(recipe, tmp_path / "run")
    last = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"][-1]
    assert last.get("skipped") == skipped


def test_three_in_a_row_go_back_to_the_last_state_and_read_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(text, "trainer.max_steps=12", "trainer.keep_checkpoints=9")
    faults = Faults(monkeypatch, recipe)
    faults.set([5, 6, 7])
    run(recipe, tmp_path / "whole")
    assert faults.read == [*((s, s) for s in range(8)), *((s, s + 4) for s in range(4, 12))]
    train = [line for line in read_metrics(tmp_path / "whole/metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 6, 8, 10, 12]
    assert [line["rollbacks"] for line in train] == [0, 0, 1, 1, 1, 1]
    assert train[-1]["skipped"] == 3
    assert read_json(tmp_path / "whole/steps/00000012/state.json")["rows"] == 4 * 16
    assert load_model(tmp_path / "whole/model").provenance["rollbacks"] == 1
    for step in (4, 8):  # killed before the next state was written, and after
        out = cut_back(tmp_path / "whole", tmp_path / f"killed-{step}", step)
        run(recipe, out)
        assert_equal_at(12, out, tmp_path / "whole")


def test_a_state_that_leads_astray_again_gives_way_to_an_older_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(text, "trainer.max_steps=12")
    faults = Faults(monkeypatch, recipe)
    faults.set(range(5, 12))
    run(recipe, tmp_path / "run")
    pairs = itertools.pairwise(faults.read)
    assert [after for before, after in pairs if after[0] <= before[0]] == [(4, 8), (0, 12)]
    assert read_json(tmp_path / "run/steps/00000012/state.json")["guard"]["rollbacks"] == 2


def test_a_run_that_goes_astray_from_every_state_ends_in_one_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(text)
    Faults(monkeypatch, recipe).set(range(40))
    with pytest.raises(NestlingError, match=r"goes astray before step 4 from every state.*optim\.lr"):
        run(recipe, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/steps").iterdir()] == ["00000000"]


# ---------------------------------------------------------------- stopping


def kill_myself(number: int, then: Callable[..., Any]) -> Callable[..., Any]:
    def killing(*arguments: Any, **named: Any) -> Any:
        if named.get("step") != 0:  # the state that a run begins with is not the last one
            os.kill(os.getpid(), number)
        return then(*arguments, **named)

    return killing


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_ends_the_run_at_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(TextData, "prepare", kill_myself(number, TextData.prepare))
    with pytest.raises(SystemExit) as stopped:
        run(make_recipe(text), tmp_path / "run")
    assert stopped.value.code == code
    assert not (tmp_path / "run").exists()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize(
    "place",
    [
        "train.run.fit.evaluate_family",
        "models.checkpoint.folder.write_family",
        "train.run.callbacks.checkpoint.save_state",
    ],
)
def test_a_signal_at_the_end_is_no_success_and_the_same_command_finishes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While the last state is saved, while the family is measured, amid the files of the model."""
    recipe = make_recipe(text, "trainer.checkpoint_every=100")
    run(recipe, tmp_path / "whole")
    module, _, name = place.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    with monkeypatch.context() as patch:
        patch.setattr(place, kill_myself(signal.SIGTERM, original))
        with pytest.raises(SystemExit) as stopped:
            run(recipe, tmp_path / "run")
    assert stopped.value.code == 143
    assert not (tmp_path / "run/model").exists()
    assert not list((tmp_path / "run").rglob(".*"))
    run(recipe, tmp_path / "run")
    assert_equal_at(8, tmp_path / "run", tmp_path / "whole")
    assert load_model(tmp_path / "run/model").provenance["steps"] == 8


def test_a_run_whose_time_is_up_is_saved_and_no_success(text: Path, tmp_path: Path, finished: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(make_recipe(text, "trainer.max_time=00:00:00:00"), tmp_path / "run")
    assert stopped.value.code == 143
    assert sorted(path.name for path in (tmp_path / "run/steps").iterdir()) == ["00000000", "00000001"]
    run(make_recipe(text), tmp_path / "run")
    assert_equal_at(8, tmp_path / "run", finished)
