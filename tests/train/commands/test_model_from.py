"""Runs that begin from given weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from models.base.errors import UsageError
from models.base.files import read_json
from models.checkpoint.folder import ModelFolder, load_model, save_model
from models.checkpoint.weights import weights_of
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.owning import owned_weights
from train.cli import main
from train.data.tokenizer import train_bpe
from train.recipe.recipe import load_recipe, load_saved_recipe
from train.run.blend import blend
from train.run.start import check_start, hash_tensors

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
Train = Callable[..., ModelFolder]
QUICK = {
    "data.sequence_length": 32,
    "data.valid_fraction": 0.1,
    "trainer.max_steps": 6,
    "trainer.batch_size": 4,
    "trainer.val_check_interval": 3,
    "trainer.limit_val_batches": 1,
    "trainer.checkpoint_every": 3,
    "trainer.accelerator": "cpu",
    "sampler.min_rows": 1,
    "tracking.wandb": "disabled",
    "tracking.tensorboard": "false",
    "dtype": "fp32",
}


@pytest.fixture(scope="module")
def text(write_words: Callable[[int], Path]) -> Path:
    return write_words(60)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, corpus_words: list[str]) -> Path:
    """A model folder as a user has it: weights in bf16, a tokenizer, a template, a family of its own."""
    tokenizer = train_bpe([" ".join(corpus_words)] * 9, vocab_size=280)
    config = ElasticConfig(
        vocab_size=288,  # wider than the tokenizer, as real models often are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=5000.0,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(3))
    return save_model(
        tmp_path_factory.mktemp("given") / "model",
        model.to(torch.bfloat16),
        tokenizer=tokenizer.backend,
        family={"H": Granularity.parse("ffn=0.5"), "E": Granularity.parse("layers=0-1")},
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def train(text: Path, tmp_path_factory: pytest.TempPathFactory, quick_machine: None) -> Train:
    def run(start: Path, *words: str, out: Path | None = None) -> ModelFolder:
        keys = {"model.from": start, "data.source": text, "data.cache_dir": text.parent / "cache", **QUICK}
        settings = [f"{key}={value}" for key, value in keys.items()]
        out = out or tmp_path_factory.mktemp("runs") / "run"
        assert main(["train", "--out", str(out), *settings, *words]) == 0
        return load_model(out / "model")

    return run


@pytest.fixture(scope="module")
def unmoved(given: Path, train: Train) -> ModelFolder:
    return train(given, "optim.lr=1e-30")


def test_a_run_that_does_not_learn_keeps_the_given_weights(given: Path, unmoved: ModelFolder) -> None:
    before = weights_of(load_model(given, dtype=torch.float32).model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(unmoved.model).items())


def test_shape_family_tokenizer_and_template_are_those_of_the_given_model(
    given: Path, unmoved: ModelFolder
) -> None:
    recipe_file = unmoved.path.parent / "recipe.yaml"
    recipe = load_saved_recipe(recipe_file)
    assert (recipe.model.hidden_size, recipe.model.rope_theta) == (32, 5000.0)
    assert "\n  from: " in recipe_file.read_text()
    assert unmoved.model.config == load_model(given).model.config
    assert list(unmoved.family) == ["H", "E", "XL"]
    assert unmoved.chat_template == TEMPLATE
    assert (unmoved.path / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    start = unmoved.provenance["start"]
    assert start["path"] == str(given)
    assert len(start["sha256"]) == 64
    assert unmoved.provenance["teacher"]["sha256"] == start["sha256"], "the original held it"


def test_a_run_from_given_weights_goes_on_bit_for_bit(given: Path, train: Train, tmp_path: Path) -> None:
    whole = train(given, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for gone in ("model", "steps/00000006"):
        shutil.rmtree(tmp_path / "parts" / gone)
    parts = train(given, out=tmp_path / "parts")
    ours, theirs = weights_of(parts.model), weights_of(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_json(tmp_path / "parts" / "data.json")["start"] == whole.provenance["start"]["sha256"]


def test_a_gguf_file_begins_a_run(given: Path, train: Train, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    words = ["--granularity", "full", "--format", "gguf", "--dtype", "fp32", "--out", str(file)]
    assert main(["extract", str(given), *words]) == 0
    trained = train(file, "optim.lr=1e-30", "trainer.max_steps=1")
    before = weights_of(load_model(given, dtype=torch.float32).model)
    after = weights_of(trained.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert trained.chat_template == TEMPLATE
    assert trained.tokenizer is not None


def test_the_trust_term_holds_the_full_model_to_its_original(given: Path, train: Train) -> None:
    def moved(trust: float) -> float:
        after = weights_of(train(given, "optim.eps=1e-3", f"loss.trust={trust}", "family={}").model)
        before = weights_of(load_model(given, dtype=torch.float32).model)
        return sum(float((after[name] - before[name]).norm()) for name in before)

    assert moved(1.0) < 0.1 * moved(0.0), "KL alone is 0 at the start, and its gradient but for rounding"


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ([], [1, 1, 1, 1]),
        (["loss.trust_every=3"], [0, 0, 3, 0]),
        (["loss.trust_every=3", "loss.trust=0"], [1, 1, 1, 1]),
        (["model.train=owned"], [0, 0, 0, 0]),
    ],
)
def test_the_full_model_is_held_in_the_steps_that_trust_every_names(
    given: Path, words: list[str], weights: list[float]
) -> None:
    recipe = load_recipe(overrides=[f"model.from={given}", "data.sequence_length=32", *words])
    assert [recipe.full_weight(step) for step in range(4)] == weights
    assert recipe.owned_optim.lr == 2e-3, "of a joint run and of a draft"


def test_in_the_steps_between_the_full_model_only_teaches(given: Path, train: Train) -> None:
    words = ["loss.trust_every=2", "family={H: ffn=0.5}", "trainer.log_every_n_steps=1"]
    run = train(given, *words).path.parent
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    terms = [{name for name in line if name.startswith("loss/")} for line in lines if line["kind"] == "train"]
    assert terms[:3] == [{"loss/H"}, {"loss/XL", "loss/H"}, {"loss/H"}]


def test_in_a_step_between_there_may_be_nothing_to_teach(given: Path, train: Train) -> None:
    words = ["loss.trust_every=2", "family={H: ffn=0.5}", "sampler.row_fraction=0.125"]
    run = train(given, *words, "sampler.min_rows=4", "trainer.log_every_n_steps=1").path.parent
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    terms = [{name for name in line if name.startswith("loss/")} for line in lines if line["kind"] == "train"]
    assert terms[0] == set()


def test_the_end_of_a_run_goes_a_part_of_the_way_back_to_the_original(
    given: Path, train: Train, tmp_path: Path
) -> None:
    words = ["optim.lr=1e-2", "loss.trust_every=2", "family={H: ffn=0.5}"]
    whole = train(given, *words, "model.blend=1", out=tmp_path / "run")
    half = train(given, *words, "model.blend=0.5", out=tmp_path / "run")  # the same run, ended otherwise
    before, after = weights_of(load_model(given, dtype=torch.float32).model), weights_of(whole.model)
    for name, tensor in weights_of(half.model).items():
        assert not torch.equal(after[name], before[name])
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2)
    owned = dict(owned_weights(whole.model))
    assert all(torch.equal(tensor, owned[name]) for name, tensor in owned_weights(half.model))
    assert (whole.provenance["blend"], half.provenance["blend"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("words", "moved", "kept"),
    [([], 0.0, 1.0), ([], 1.0, 0.5), (["loss.trust=0"], 1.0, 1.0), (["model.train=owned"], 1.0, 1.0)],
    ids=["as good", "worse", "not held", "frozen"],
)
def test_the_full_model_goes_back_if_it_became_worse(
    given: Path, words: list[str], moved: float, kept: float
) -> None:
    recipe = load_recipe(overrides=[f"model.from={given}", "data.sequence_length=32", *words])
    model, original = (load_model(given, dtype=torch.float32).model for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(moved * torch.randn(weight.shape, generator=generator))
        tokens_BT = torch.randint(280, (4, 32), generator=generator)
        probs_NV = original(tokens_BT).flatten(0, 1).softmax(-1)
        labels_BT = torch.multinomial(probs_NV, 1, generator=generator).view_as(tokens_BT)  # its own words
    name = "model.embed_tokens.weight"
    worse, start = weights_of(model)[name].clone(), weights_of(original)[name]
    console = Console(record=True, width=200)
    assert blend(model, recipe, [(tokens_BT, labels_BT)], console) == kept
    torch.testing.assert_close(weights_of(model)[name], start + kept * (worse - start))
    assert ("with 0.5 of what changed" in console.export_text()) == (kept == 0.5)


def test_the_recipe_of_a_run_without_a_start_says_null(text: Path) -> None:
    recipe = load_recipe(overrides=["seed=1"])
    assert recipe.model.from_ is None
    assert check_start(recipe) is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.hidden_size=64"], "model.hidden_size=64: is 32 in model.from={given}; leave it out"),
        (["size=1M"], "model.hidden_size=128: is 32 in model.from={given}; leave it out"),
        (["data.sequence_length=256"], "is longer than model.max_position_embeddings=128"),
        (["data.tokenizer={other}"], "data.tokenizer={other}: its 257 tokens are not the 280 of"),
        (["family={F: layers=0-5}"], "family.F=layers=0-5"),
        (["model.from=nowhere"], "model.from=nowhere: nowhere does not exist"),
    ],
)
@pytest.mark.parametrize("flags", [["--dry-run"], ["--out", "run"]], ids=["dry", "wet"])
def test_what_does_not_fit_the_given_model_is_named_and_leaves_nothing(
    words: list[str],
    named: str,
    flags: list[str],
    given: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    monkeypatch.chdir(here)
    other.mkdir()
    train_bpe(["def area(width, height):"], vocab_size=257).save(other)
    words = [word.replace("{other}", str(other)) for word in words]
    keys = [f"model.from={given}", "data.sequence_length=32", f"data.source={text}"]
    assert main(["train", *flags, *keys, *words]) == 2
    error = capsys.readouterr().err
    assert named.replace("{given}", str(given)).replace("{other}", str(other)) in error
    assert list(here.iterdir()) == []


def test_other_weights_are_refused_and_the_recipe_opens_without_any(
    given: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, out = tmp_path / "start", tmp_path / "run"
    shutil.copytree(given, start)
    words = ["loss.trust=0", "trainer.max_steps=1"]
    train(start, *words, out=out)
    tensors = load_file(start / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, start / "model.safetensors")
    with pytest.raises(AssertionError):
        train(start, *words, out=out)
    assert "holds a run with another model.from: hash" in capsys.readouterr().err
    shutil.rmtree(start)
    assert load_saved_recipe(out / "recipe.yaml").model.from_ == str(start)
    with pytest.raises(UsageError, match=r"model\.from"):
        load_recipe([out / "recipe.yaml"])


def test_a_dry_run_shows_the_given_shape_and_the_frozen_original(
    given: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.from={given}", "data.sequence_length=32", f"data.source={text}"]
    assert main(["train", "--dry-run", *words]) == 0
    out = capsys.readouterr().out
    assert f"from: {given}" in out
    assert "288 (that model has it)" in out
    assert "frozen original" in out


def test_a_dry_run_refuses_conversations_without_a_chat_template(
    given: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(given, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    words = [f"data.source={text}", "data.messages_field=messages", "data.sequence_length=32"]
    assert main(["train", "--dry-run", f"model.from={bare}", *words]) == 2
    assert f"model.from={bare}: has no chat template" in capsys.readouterr().err
    assert main(["train", "--dry-run", f"model.from={given}", *words]) == 0
    assert main(["train", "--dry-run", "size=1M", *words]) == 2
    assert "data.messages_field=messages: needs a chat template" in capsys.readouterr().err


# ---------------------------------------------------------------- model.train=owned


OWNED = ["model.train=owned", "owned.rank=2", "family={F: 'ffn=0.5,layers=0:2', E: layers=0}"]


def test_training_what_members_own_leaves_the_full_model_bit_for_bit(given: Path, train: Train) -> None:
    trained = train(given, *OWNED, "optim.lr=0.05")
    before = weights_of(load_model(given, dtype=torch.float32).model)
    after = weights_of(trained.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    start = trained.provenance["start"]
    assert start["tensors_sha256"] == hash_tensors(trained.model) == hash_tensors(load_model(given).model)
    assert trained.provenance["teacher"] is None, "nothing must be held"
    own = dict(owned_weights(trained.model))
    assert any(bool(tensor.any()) for name, tensor in own.items() if "lora_B" in name)
    assert not torch.equal(own["E.norm.weight"], before["model.norm.weight"]), "an exit learns, too"


def test_only_what_is_owned_has_moments_and_a_run_of_it_goes_on_bit_for_bit(
    given: Path, train: Train, tmp_path: Path
) -> None:
    whole = train(given, *OWNED, out=tmp_path / "whole")
    moments = load_file(tmp_path / "whole" / "steps" / "00000006" / "optimizer.safetensors")
    assert moments
    assert all(name.startswith("owned.") for name in moments)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for gone in ("model", "steps/00000006"):
        shutil.rmtree(tmp_path / "parts" / gone)
    parts = train(given, *OWNED, out=tmp_path / "parts")
    ours, theirs = dict(owned_weights(parts.model)), dict(owned_weights(whole.model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_members_own_goes_on_learning_in_another_run(given: Path, train: Train, tmp_path: Path) -> None:
    first = train(given, *OWNED, "owned.norms=false")
    again = train(first.path, "model.train=owned", "optim.lr=1e-30")
    assert list(again.family) == ["F", "XL"], "an exit without norms owns nothing"
    ours, before = dict(owned_weights(again.model)), dict(owned_weights(first.model))
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[name], before[name]) for name in before)
    recipe = load_saved_recipe(again.path.parent / "recipe.yaml")
    assert (recipe.owned.norms, recipe.owned.rank) == (False, 2)


def test_a_draft_that_is_owned_learns_to_be_accepted(given: Path, train: Train) -> None:
    def alpha(*words: str) -> float:
        members = train(given, *OWNED, "trainer.batch_size=8", *words).members
        return next(member.alpha for member in members if member.name == "F" and member.alpha)

    assert alpha("trainer.max_steps=25", "optim.lr=0.02") > alpha("trainer.max_steps=1", "optim.lr=1e-9")


@pytest.mark.parametrize(
    "words",
    [
        ["model.train=owned", "owned.norms=true"],
        ["loss.trust_every=3", "model.blend=1"],
    ],
)
def test_micro_batches_change_nothing_where_a_turn_is_rare(
    words: list[str], given: Path, train: Train
) -> None:
    """A member without one must not move, be it in a micro-batch or in the whole step."""
    words = [*words, "family={F: ffn=0.5, G: ffn=0.25}", "owned.rank=2", "owned.lr=0.01"]
    words += ["sampler.row_fraction=0.1", "sampler.min_rows=1", "trainer.max_steps=12"]
    whole, parts = (
        train(given, *words, f"trainer.batch_size={8 // count}", f"trainer.accumulate_grad_batches={count}")
        for count in (1, 4)
    )
    theirs = dict(owned_weights(parts.model))
    for name, tensor in owned_weights(whole.model):
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)


def test_the_full_model_scores_what_a_draft_that_is_owned_writes(given: Path, train: Train) -> None:
    read, written = (
        dict(owned_weights(train(given, *OWNED, *words).model))
        for words in ([], ["distill.written_fraction=0.5", "distill.prompt_tokens=4"])
    )
    assert any(not torch.equal(read[name], written[name]) for name in read)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.train=owned", "owned.norms=false", "owned.rank=0"], "members own nothing; set owned.norms"),
        (["model.train=owned", "family={}"], "there is no member beside the full model"),
        (["model.train=owned", "family={E: layers=0}", "owned.norms=false"], "early exits own a norm alone"),
        (["model.train=owned", "model.from=null"], "would keep its random weights; set model.from"),
        (["model.train=owned", "loss.trust=0.5"], "loss.trust=0.5: has no effect with model.train=owned"),
        (["model.train=owned", "loss.teacher=x"], "loss.teacher=x: has no effect with model.train=owned"),
        (
            ["model.train=owned", "sampler.kind=random", "sampler.probabilities={XL: 1}"],
            "must be above 0",
        ),
    ],
)
def test_training_of_nothing_is_refused(
    words: list[str], named: str, given: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"model.from={given}", "data.sequence_length=32", f"data.source={text}"]
    assert main(["train", "--dry-run", *keys, *words]) == 2
    assert named in capsys.readouterr().err


def test_a_dry_run_counts_what_is_owned(given: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model.from={given}", "data.sequence_length=32", f"data.source={text}", *OWNED]
    assert main(["train", "--dry-run", *words]) == 0
    assert "the full model's stay as they are" in capsys.readouterr().out
