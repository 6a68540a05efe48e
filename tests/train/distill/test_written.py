"""Rows that a model continues itself: who writes them, what is learned from them, and going on."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from models.base.errors import UsageError
from models.checkpoint.folder import load_model
from models.checkpoint.weights import hash_weights
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.data.module import TextData
from train.distill.written import WrittenRows, written_rows
from train.objective.joint_loss import joint_loss
from train.objective.losses import cross_entropy
from train.objective.sampler import StepPlan
from train.objective.teacher import ElasticTeacher
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.sections import LossConfig
from train.run.fit import fit
from train.run.state import load_state

QUIET = Console(quiet=True)
SMALL = "model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=2 dtype=fp32"
QUICK = (
    "trainer.max_steps=6 trainer.batch_size=4 trainer.checkpoint_every=3 loss.ramp_start=0 loss.ramp_steps=2"
)
WRITTEN = "distill.written_fraction=0.5 distill.prompt_tokens=4 distill.replay_steps=4"


def make_recipe(teacher: Path, text: Path, *words: str) -> Recipe:
    given = [f"loss.teacher={teacher}", f"data.source={text}", f"data.cache_dir={text.parent / 'data'}"]
    given += ["data.sequence_length=16", "tracking.wandb=disabled", "tracking.tensorboard=false"]
    given += ["family={D: layers=0}", "sampler.exit_stride=1"]
    return load_recipe(overrides=[*SMALL.split(), *QUICK.split(), *WRITTEN.split(), *given, *words])


def make_rows(recipe: Recipe) -> tuple[WrittenRows, TextData, ElasticLM]:
    data = TextData(recipe).prepare()
    model = load_model(recipe.loss.teacher or "").model
    rows = WrittenRows(recipe, lambda step, micro: data.train_dataloader().batch(step, micro), "fp32")
    return rows, data, model


def test_a_fraction_of_the_rows_begins_as_the_text_and_goes_on_by_the_student(
    teacher_folder: Path, text: Path
) -> None:
    rows, data, model = make_rows(make_recipe(teacher_folder, text))
    members = {"XL": FULL}
    batch = data.train_dataloader().batch(1, 0)
    mixed = rows.mix(batch, model, members)
    assert rows.rows == [1, 3]
    for kept in (0, 2):
        assert torch.equal(mixed.tokens_BT[kept], batch.tokens_BT[kept])
        assert torch.equal(mixed.labels_BT[kept], batch.labels_BT[kept])
    assert mixed.written_BT is not None
    for own in (1, 3):
        assert torch.equal(mixed.tokens_BT[own, :4], batch.tokens_BT[own, :4])
        assert not torch.equal(mixed.tokens_BT[own], batch.tokens_BT[own])
        assert torch.equal(mixed.labels_BT[own, :-1], mixed.tokens_BT[own, 1:])
        assert mixed.written_BT[own].tolist() == [False] * 3 + [True] * 13
    assert not mixed.written_BT[::2].any()
    assert int((mixed.labels_BT >= 0).sum()) == int((batch.labels_BT >= 0).sum()), "the divisor stays"
    assert sorted(map(int, rows.replay)) == [1, 2, 3], "up to the next multiple of replay_steps"


@pytest.mark.parametrize("words", [[], ["distill.writer=D"], ["trainer.accumulate_grad_batches=2"]])
def test_what_is_written_is_a_function_of_seed_and_step(
    teacher_folder: Path, text: Path, words: list[str]
) -> None:
    """And of the weights, and of who writes."""
    recipe = make_recipe(teacher_folder, text, *words)
    members = {"D": Granularity.parse("layers=0"), "XL": FULL}

    def written(of: Recipe, step: int = 2) -> torch.Tensor:
        rows, data, model = make_rows(of)
        batch = data.train_dataloader().batch(step, 0)
        return rows.mix(batch, model, members).tokens_BT

    assert torch.equal(written(recipe), written(recipe))
    assert not torch.equal(written(recipe), written(make_recipe(teacher_folder, text, *words, "seed=1")))
    if words:
        assert not torch.equal(written(recipe)[1], written(make_recipe(teacher_folder, text))[1])


def test_cross_entropy_reads_no_word_that_a_model_wrote(
    tiny_model: ElasticLM, teacher: ElasticLM, batch: Batch
) -> None:
    written_BT = torch.zeros_like(batch.labels_BT, dtype=torch.bool)
    written_BT[2, 3:] = True
    mixed = batch._replace(written_BT=written_BT)
    plan = StepPlan(full=1.0, exits=(), slots=())

    def loss(of: Batch, config: LossConfig) -> float:
        says = ElasticTeacher(teacher)
        return float(joint_loss(tiny_model, {"XL": FULL}, of, plan, config, block=3, teacher=says).total)

    with torch.no_grad():
        text_BT = cross_entropy(tiny_model(batch.tokens_BT).flatten(0, 1), batch.labels_BT.flatten())
        kept = text_BT[~written_BT.flatten()].sum() / batch.num_valid
        assert loss(mixed, LossConfig(ramp_start=99)) == pytest.approx(float(kept), rel=1e-5)
        taught = LossConfig(ramp_start=0, ramp_steps=0)
        assert loss(mixed, taught) == pytest.approx(loss(batch, taught), rel=1e-6), "the teacher scores them"


@pytest.mark.parametrize("writer", ["student", "D", "teacher"])
def test_a_run_that_goes_on_amid_a_window_equals_one_that_was_not_stopped(
    teacher_folder: Path, text: Path, tmp_path: Path, writer: str
) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.writer={writer}", "loss.text_weight=0.5")
    whole = fit(recipe, tmp_path / "whole", console=QUIET)
    state = tmp_path / "whole" / "steps" / "00000003"
    assert (state / "replay.safetensors").is_file()
    resumed = fit(recipe, tmp_path / "resumed", resume=str(state), console=QUIET)
    assert hash_weights(resumed) == hash_weights(whole)
    more = make_recipe(teacher_folder, text, f"distill.writer={writer}", "trainer.batch_size=8")
    assert load_state(state).replay(recipe)
    assert load_state(state).replay(more) == {}, "they begin as rows that are of another step now"
    plain = make_recipe(teacher_folder, text, "distill.written_fraction=0", "loss.text_weight=0.5")
    assert hash_weights(fit(plain, tmp_path / "plain", console=QUIET)) != hash_weights(whole)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["loss.teacher=null"], "nobody scores what is written"),
        (["distill.cache=somewhere"], "distill.cache knows the text alone"),
        (["distill.written_fraction=0.1"], "less than one of 4 rows a step; set it to 0.25"),
        (["distill.prompt_tokens=16"], "leaves nothing of data.sequence_length=16"),
        (
            ["distill.writer=D", "distill.written_fraction=0"],
            "has no effect without distill.written_fr",
        ),
        (["distill.writer=Z"], "neither student, teacher nor a member"),
    ],
)
def test_what_cannot_be_written_is_refused(words: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        make_recipe(Path("teacher"), Path("text.txt"), *words)


def test_written_rows_are_spread_evenly() -> None:
    for fraction in (0.25, 0.5, 0.75, 1.0):
        assert len(written_rows(fraction, 8)) == 8 * fraction
