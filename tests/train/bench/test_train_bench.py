"""`nestling bench --train` as a user meets it, and the arithmetic of its rows."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from models.checkpoint.folder import save_model
from models.elastic.model import ElasticLM
from train.bench import train_bench
from train.bench.train_bench import choose_contenders, compare, make_row
from train.bench.trainers import Contender
from train.cli import main
from train.data.module import TextData
from train.recipe.recipe import load_recipe

TINY = (
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "family={S: ffn=0.25, D: layers=0}",
    "data.vocab_size=300",
    "data.sequence_length=16",
    "trainer.batch_size=4",
    "trainer.accelerator=cpu",
    "dtype=fp32",
)
ROW = {
    "engine", "mode", "tokens_per_second", "seconds_per_step", "seconds_per_step_by_round", "mfu",
    "peak_bytes", "training_bytes", "step_ratio", "peak_ratio", "training_ratio",
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(f"the cat {n} sat on a mat and saw one dog" for n in range(99)))
    return path


@pytest.mark.filterwarnings("ignore")  # theirs, of their own settings
def test_everyone_trains_and_is_compared_with_the_full_model(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {
        "XL": {"peak_bytes": 300, "training_bytes": 100},
        "S": {"peak_bytes": 330, "training_bytes": 130},
    }
    monkeypatch.setattr(train_bench, "measure_memory", lambda who: memory["S" if who.recipe.family else "XL"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "bench.json"
    overrides = [*TINY, f"data.source={text}", f"data.cache_dir={tmp_path}"]
    code = main(["bench", "--train", "--rounds", "2", "--steps", "1", "--json", str(out), *overrides])
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert code == 0
    assert '{"' not in printed
    rows = document["results"]
    wanted = [("nestling", "full"), ("nestling", "joint")]
    wanted += [("transformers", "full")] if find_spec("accelerate") else []
    assert [(row["engine"], row["mode"]) for row in rows] == wanted
    assert all(set(row) == ROW and len(row["seconds_per_step_by_round"]) == 2 for row in rows)
    assert (rows[0]["step_ratio"], rows[0]["peak_ratio"]) == (1.0, 1.0)
    assert (rows[1]["peak_ratio"], rows[1]["training_ratio"]) == (1.1, 1.3)
    assert document["rows_per_step"] == 4
    assert document["card"]["dtypes"] == {"training": "fp32"}


def test_the_full_model_alone_is_the_recipe_without_its_family() -> None:
    contenders, notes = choose_contenders(load_recipe(overrides=["sampler.kind=sandwich", *TINY]), "fp32")
    full, joint = contenders[0].recipe, contenders[1].recipe
    assert (full.family, list(full.granularities)) == ({}, ["XL"])
    assert (joint.family, joint.sampler.kind) == ({"S": "ffn=0.25", "D": "layers=0"}, "sandwich")
    assert (joint.loss.ramp_start, joint.loss.ramp_steps) == (0, 0)
    assert len(contenders) + len(notes) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["model.train=owned", "model.from=somewhere"],
        ["distill.written_fraction=0.5", "distill.prompt_tokens=4", "distill.writer=S", "loss.teacher=x"],
    ],
)
def test_the_full_model_alone_trains_itself_and_writes_itself(
    words: list[str], tmp_path: Path, tiny_model: ElasticLM
) -> None:
    given = save_model(tmp_path / "given", tiny_model)
    words = [word.replace("somewhere", str(given)) for word in words]
    full = choose_contenders(load_recipe(overrides=[*TINY, *words]), "fp32")[0][0].recipe
    assert (full.model.train, full.distill.writer) == ("joint", "student")


def test_a_teacher_teaches_ours_and_a_note_says_that_theirs_learns_from_text() -> None:
    contenders, notes = choose_contenders(load_recipe(overrides=["loss.teacher=somewhere", *TINY]), "fp32")
    assert {who.recipe.loss.teacher for who in contenders} == {"somewhere"}
    assert len(notes) == 1
    assert ("text alone" in notes[0]) == (len(contenders) == 3)


def test_a_row_s_figures_are_medians_and_ratios_of_rounds() -> None:
    recipe = load_recipe(overrides=[*TINY, "trainer.accumulate_grad_batches=2"])
    who = Contender(engine="nestling", mode="full", recipe=recipe)
    memory = {"peak_bytes": 4, "training_bytes": 2}
    alone = make_row(who, [1.0, 2.0, 4.0], flops=1e9, roof=2.0, memory=memory)
    other = make_row(who, [1.1, 2.0, 6.0], flops=1e9, roof=2.0, memory=memory)
    compare([alone, other])
    assert alone["tokens_per_second"] == 4 * 2 * 16 / 2.0
    assert alone["mfu"] == 0.25
    assert other["step_ratio"] == pytest.approx(1.1)


def test_memory_is_that_of_a_fresh_process(text: Path, tmp_path: Path) -> None:
    """What this one holds is not counted, though a child inherits its `ru_maxrss`."""
    recipe = load_recipe(overrides=[*TINY, f"data.source={text}", f"data.cache_dir={tmp_path}"])
    TextData(recipe).prepare(Console(quiet=True))
    held = bytearray(b"x" * 1_500_000_000)
    memory = train_bench.measure_memory(choose_contenders(recipe, "fp32")[0][1])
    assert 0 < memory["training_bytes"] < memory["peak_bytes"] < len(held)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], ["--rounds", "0", "at least 1"]),
        (["--config", "nowhere.yaml"], ["--config", "nowhere.yaml"]),
        (["trainer.batchsize=3"], ["trainer.batchsize", "trainer.batch_size"]),
    ],
)
def test_a_mistake_ends_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--train", *arguments]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words)
