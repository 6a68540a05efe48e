"""`nestling distill`: a student, its use as a draft, and what is refused before anything is made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoint.folder import load_model
from models.elastic.granularity import Granularity
from models.elastic.view import View
from train.cli import main
from train.data.tokenizer import train_bpe
from train.recipe.recipe import load_recipe
from train.run.start import load_start

TINY = str(Path(__file__).parents[3] / "configs" / "tiny.yaml")
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def student(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    words = ["model.num_hidden_layers=1", "family={}", "dtype=fp32", "data.vocab_size=300"]
    assert main(["distill", str(model), "--config", TINY, "--out", str(out), *words]) == 0
    return out / "model"


def test_a_student_has_the_vocabulary_of_its_teacher(student: Path, model: Path) -> None:
    ours, theirs = load_model(student), load_model(model)
    assert list(ours.family) == ["XL"]
    assert ours.model.config.vocab_size == theirs.model.config.vocab_size == 512
    assert ours.provenance["recipe"]["loss"]["teacher"] == str(model)


def test_a_student_drafts_for_its_teacher(student: Path, model: Path, tmp_path: Path) -> None:
    def write(*words: str) -> dict[str, object]:
        to = tmp_path / "out.json"
        settings = ["--prompt", "def main(", "--max-new-tokens", "24", "--dtype", "fp32", "--json", str(to)]
        assert main(["generate", str(model), *settings, *words]) == 0
        return dict(json.loads(to.read_text()))

    plain = write("--draft", "none")
    drafted = write("--draft", str(student), "--gamma", "2")
    assert drafted["ids"] == plain["ids"]
    assert drafted["drafted"]


def test_a_dry_run_shows_the_teacher_and_makes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["distill", str(model), "--config", TINY, "--dry-run", "data.vocab_size=300"]) == 0
    out = capsys.readouterr().out
    assert f"teacher: {model}" in out
    assert "teacher " in out
    assert "217,536 parameters" in out, "of the teacher"
    assert "512 (the teacher has it)" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "words", "named"),
    [
        (None, ["loss.divergence=cross_entropy"], "has no effect with loss.divergence=cross_entropy"),
        (None, ["data.sequence_length=128"], "reads at most 64 tokens, fewer than data.sequence_length=128"),
        ("tokenizer.json", [], "has no tokenizer.json"),
        ("config.json", [], "is no model folder"),
        (None, ["data.tokenizer={other}"], "data.tokenizer={other}: its 257 tokens are not the 512 of"),
    ],
)
@pytest.mark.parametrize("flags", [["--dry-run"], ["--out", "run"]], ids=["dry", "wet"])
def test_a_teacher_that_does_not_fit_is_named_and_leaves_nothing(
    spoil: str | None,
    words: list[str],
    named: str,
    flags: list[str],
    model: Path,
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, other, here = tmp_path / "teacher", tmp_path / "other", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copytree(model, teacher)
    if spoil:
        (teacher / spoil).unlink()
    if "{other}" in named:
        other.mkdir()
        train_bpe(["def area(width, height):"], vocab_size=257).save(other)
    words = [word.replace("{other}", str(other)) for word in words]
    line = fails("distill", teacher, "--config", TINY, *flags, *words, code=2)
    assert named.replace("{other}", str(other)) in line
    assert f"loss.teacher={teacher}" in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("teacher", ["nowhere", "seed=1"])
def test_a_teacher_that_is_not_there_is_named(teacher: str, fails: Fails) -> None:
    assert f"TEACHER {teacher} does not exist" in fails("distill", teacher, "--config", TINY, code=2)
    line = fails("train", "--config", TINY, f"loss.teacher={teacher}", "--dry-run", code=2)
    assert f"loss.teacher={teacher}: is no model folder" in line


def test_the_weights_of_a_teacher_are_read_before_anything_is_made(
    model: Path, tmp_path: Path, fails: Fails
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(model, teacher)
    (teacher / "model.safetensors").write_bytes(b"no weights")
    line = fails("distill", teacher, "--config", TINY, "--out", out, code=1)
    assert str(teacher / "model.safetensors") in line
    assert not out.exists()


def train_briefly(teacher: Path, out: Path, *words: str) -> Path:
    small = [
        "model.num_hidden_layers=1",
        "family={}",
        "dtype=fp32",
        "trainer.max_steps=3",
        "loss.ramp_start=0",
    ]
    assert main(["distill", str(teacher), "--config", TINY, "--out", str(out), *small, *words]) == 0
    return out / "model"


def test_a_gguf_file_teaches(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "teacher.gguf"
    assert main(["extract", str(model), "--granularity", "full", "--out", str(file), "--format", "gguf"]) == 0
    by_file, by_folder = (
        load_model(train_briefly(teacher, tmp_path / name)).model
        for name, teacher in (("file", file), ("folder", model))
    )
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(by_file.parameters(), by_folder.parameters(), strict=True)
    )


def test_a_model_that_only_transformers_knows_teaches_and_is_said_to_be_slower(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    teacher = tmp_path / "gpt2"
    shape = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, teacher)
    student = load_model(train_briefly(teacher, tmp_path / "run", "distill.dtype=bf16"))
    said = " ".join(capsys.readouterr().out.split())
    assert "runs in transformers' own forward pass, which is slower" in said
    assert student.provenance["teacher"]["path"] == str(teacher)


def test_a_teacher_is_placed_where_a_setting_says(model: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["--config", TINY, "--out", tmp_path / "run", "distill.device=nowhere"]
    assert "distill.device=nowhere: is no device of this machine" in fails("distill", model, *words, code=2)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_cuts_otherwise_is_refused(model: Path, tmp_path: Path, fails: Fails) -> None:
    """The same tokens, other merges: only a text shows it."""
    shutil.copytree(model, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:20]
    path.write_text(json.dumps(content))
    words = ["--config", TINY, "--out", tmp_path / "run", f"data.tokenizer={tmp_path / 'other'}"]
    assert "cuts a text in other places than loss.teacher" in fails("distill", model, *words, code=2)


def test_a_cache_is_made_alone_then_read(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    cache, words = tmp_path / "cache", ["--config", TINY, "family={}", "dtype=fp32", "trainer.max_steps=2"]
    words += ["model.num_hidden_layers=1", "loss.ramp_start=0", "data.max_documents=4"]
    assert main(["distill", str(model), *words, "--cache", str(cache), "--cache-only"]) == 0
    assert "66 bytes a token" in " ".join(capsys.readouterr().out.split())
    made = sorted(cache.glob("*.bin"))
    assert made
    stamps = [path.stat().st_mtime_ns for path in made]
    out = tmp_path / "run"
    assert main(["distill", str(model), *words, "--cache", str(cache), "--out", str(out)]) == 0
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert load_model(out / "model").provenance["teacher"]["cache"] == "topk"
    assert main(["distill", str(model), *words, "--cache", str(cache), "--dry-run"]) == 0
    assert f"16 tokens a position (topk), read from {cache}" in " ".join(capsys.readouterr().out.split())
    assert "give --cache DIR" in fails("distill", model, *words, "--cache-only", code=2)
    assert str(model) in fails("distill", model, *words, "--cache", model / "inside", code=2)


def test_a_student_may_begin_as_a_prefix_of_its_teacher(model: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["loss.teacher={0}", "model.from={0}", "model.num_hidden_layers=1", "model.intermediate_size=48"]
    small = ["family={}", "data.sequence_length=32"]
    recipe = load_recipe(overrides=[word.format(model) for word in words] + small)
    ours, theirs = load_start(recipe), load_model(model).model
    assert (ours.config.num_hidden_layers, ours.config.intermediate_size) == (1, 48)
    view = View(theirs, Granularity.parse(f"layers=0,ffn={48 / theirs.config.intermediate_size}", {}))
    for name, tensor in view.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    student = load_model(train_briefly(model, tmp_path / "run", f"model.from={model}", "optim.lr=1e-9"))
    assert student.model.config.num_hidden_layers == 1
    close = student.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(
        close, theirs.state_dict()["model.layers.0.mlp.up_proj.weight"], atol=1e-6, rtol=0
    )
    words = [*words[:2], "model.num_hidden_layers=99"]
    line = fails("train", *[word.format(model) for word in words], *small, "--out", tmp_path / "no", code=2)
    assert "model.num_hidden_layers=99: is 3 in model.from" in line
