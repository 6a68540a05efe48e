"""Runs that are gone on with: what does not belong together is refused, and loses nothing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.base.files import read_json, write_json
from train.cli import main
from train.data.loader import StepLoader
from train.data.pack import Rows
from train.recipe.recipe import load_recipe
from train.run.identity import Identity, what_changes

Train = Callable[..., str]
TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
SMALL = ("data.max_documents=null", "data.vocab_size=300", "data.sequence_length=16", "dtype=fp32")
QUICK = ("trainer.max_steps=4", "trainer.batch_size=4", "trainer.checkpoint_every=4")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "c.txt"
    path.write_text("\n<|endoftext|>\n".join(f"the cat number {n} sat on mat {n * 7}" for n in range(80)))
    return path


@pytest.fixture
def train(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Runs `nestling train` to a folder; gives what it said."""

    def run(out: str, *more: str, code: int = 0) -> str:
        capsys.readouterr()
        words = (f"data.source={corpus}", f"data.cache_dir={tmp_path / 'cache'}", *SMALL, *QUICK)
        assert main(["train", "--config", str(TINY), "--out", str(tmp_path / out), *words, *more]) == code
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def add_words(corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + "\n<|endoftext|>\nzebra quagga okapi " * 40)


def test_a_finished_run_is_not_written_again_with_other_data(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    train("r1")
    before = contents(tmp_path / "r1")
    add_words(corpus)
    said = train("r1", code=2)
    assert "--out" in said
    assert "holds a run on other data: hash " in said
    assert ", now " in said
    assert "use another --out or the old data" in said
    assert contents(tmp_path / "r1") == before
    train("r1", "--resume", "never")


def test_an_interrupted_run_does_not_go_on_with_other_data(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    train("r1")
    shutil.rmtree(tmp_path / "r1" / "model")
    before = contents(tmp_path / "r1")
    add_words(corpus)
    assert "holds a run on other data" in train("r1", "trainer.max_steps=8", code=2)
    assert contents(tmp_path / "r1") == before


def test_a_run_from_before_there_was_a_record_is_known_by_its_models_tokenizer(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    train("r1")
    (tmp_path / "r1" / "data.json").unlink()
    shutil.rmtree(tmp_path / "r1" / "steps")
    add_words(corpus)
    assert "holds a run on other data (its tokenizer): hash" in train("r1", code=2)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("model.hidden_size=32", r"model.hidden_size=64 (now 32)"),
        ("seed=4", r"seed=0 (now 4)"),
        ("optim.lr=0.5", r"optim.lr=0.003 (now 0.5)"),
        ("data.sequence_length=8", r"data.sequence_length=16 (now 8)"),
    ],
)
def test_a_state_of_another_run_is_compared_like_the_runs_own_folder(
    train: Train, tmp_path: Path, more: str, told: str
) -> None:
    train("r1")
    state = tmp_path / "r1" / "steps" / "00000004"
    said = train("r2", more, "--resume", str(state), code=2)
    assert f"--resume {state} holds a run with {told}" in said
    assert not (tmp_path / "r2").exists()


def test_another_length_by_the_dial_is_said_to_be_one(train: Train) -> None:
    train("r1")
    said = train("r1", "loss.ramp_start=3", code=2)
    assert (
        "(now 3); tokens=... sets that; to train longer, keep it as it was and set trainer.max_steps" in said
    )


def test_a_state_of_the_same_recipe_on_other_text_is_refused(
    train: Train, corpus: Path, tmp_path: Path
) -> None:
    train("r1")
    state = tmp_path / "r1" / "steps" / "00000004"
    copied = shutil.copytree(state, tmp_path / "copied" / "00000004")
    add_words(corpus)
    for path in (state, copied):
        said = train("r2", "trainer.max_steps=8", "--resume", str(path), code=2)
        assert f"--resume {path} holds a run on other data: hash" in said
    assert not (tmp_path / "r2").exists()


def test_where_a_run_keeps_its_tokens_may_change(train: Train, tmp_path: Path) -> None:
    train("r1")
    train("r1", f"data.cache_dir={tmp_path / 'elsewhere'}", "trainer.max_steps=6")
    state = read_json(tmp_path / "r1/steps/00000006/state.json")
    assert (state["step"], state["rows"]) == (6, 24)


def test_a_run_that_goes_on_with_other_sizes_says_so_and_reads_on_where_it_was(
    train: Train, tmp_path: Path
) -> None:
    train("r1")
    said = train("r1", "trainer.max_steps=8", "trainer.batch_size=2")
    assert "trainer.max_steps=8, was 4: the learning rate goes on from" in said
    assert "trainer.batch_size=2, was 4" in said
    assert "a step reads 2 rows now, from row 16 on: none is skipped or read again" in said
    assert read_json(tmp_path / "r1/steps/00000008/state.json")["rows"] == 16 + 4 * 2
    assert "was" not in train("r1", "trainer.max_steps=8", "trainer.batch_size=2")


def test_a_loader_that_goes_on_with_other_sizes_reads_every_row_once() -> None:
    rows = Rows(stream=np.arange(40 * 8 + 1, dtype=np.uint16), sequence_length=8)
    one = StepLoader(rows=rows, batch_size=8, seed=3, num_steps=2)
    two = StepLoader(rows=rows, batch_size=4, seed=3, num_steps=8, start_step=2, first_row=16)
    read = [*one.row_ids(0), *one.row_ids(1)] + [int(i) for step in range(2, 8) for i in two.row_ids(step)]
    assert sorted(read) == list(range(40))


def test_a_dtype_that_resolves_to_another_one_is_told() -> None:
    recipe = load_recipe()
    ours, theirs = Identity(recipe={}, dtype="bf16"), Identity(recipe={}, dtype="fp32")
    assert what_changes(recipe, ours, theirs, step=1, row=1) == ["dtype=auto is bf16 here, was fp32"]


def test_a_record_with_unknown_fields_still_serves(train: Train, tmp_path: Path) -> None:
    train("r1")
    record = tmp_path / "r1" / "data.json"
    write_json(record, {**read_json(record), "of_the_future": 1})
    train("r1")
