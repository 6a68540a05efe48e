"""A text model of Gemma 3 that stock transformers wrote, through the commands that a user gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from models.checkpoint.folder import load_model
from models.checkpoint.huggingface import load_stock
from models.checkpoint.weights import weights_of
from models.elastic.granularity import Granularity
from models.elastic.view import View
from train.cli import main
from train.data.tokenizer import train_bpe

GATE = "model.layers.0.mlp.gate_proj.weight"
NEW = 24
"""New tokens of a text, which outgrow the window several times."""
FP32 = ["--dtype", "fp32", "--max-new-tokens", str(NEW)]
PROMPTS = ["the cat sat on a mat", "one dog saw the small house and sat", "its"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory, corpus_words: list[str]) -> Path:
    """As `google/gemma-3-*` are: tied, every third layer whole, positions of those stretched."""
    path = tmp_path_factory.mktemp("gemma") / "stock"
    tokenizer = train_bpe([" ".join(corpus_words)] * 9, vocab_size=280)
    config = Gemma3TextConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=6,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    Gemma3ForCausalLM(config).save_pretrained(path)
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=tokenizer.backend, eos_token="<|endoftext|>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(write_words: Callable[[int], Path]) -> Path:
    return write_words(60)


def generate(model: Path, *words: str) -> dict[str, Any]:
    results = model.parent / "generated.json"
    assert main(["generate", str(model), *FP32, *words, "--json", str(results)]) == 0
    written: dict[str, Any] = json.loads(results.read_text())
    return written


def test_text_is_that_of_transformers_with_any_draft_alone_and_in_a_batch(gemma: Path) -> None:
    stock: Any = load_stock(gemma)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma)
    plain = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = stock.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        plain.append(written.tolist())
        for draft in ("none", "ffn=0.5", "layers=0-1"):
            ours = generate(gemma, "--prompt", prompt, "--draft", draft)["ids"]
            assert ours == plain[-1][: len(ours)]
            assert len(plain[-1]) - len(ours) in (0, 1), "all but the token that ends a text"
    file = gemma.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    many = generate(gemma, "--prompts", str(file), "--batch-size", "3", "--draft", "ffn=0.5", "--gamma", "3")
    for row, ids in zip(many["results"], plain, strict=True):
        assert row["ids"] == ids[: len(row["ids"])]


def test_members_are_measured_and_cut_out(gemma: Path, text: Path, tmp_path: Path) -> None:
    results = tmp_path / "evaluate.json"
    words = ["--data", str(text), "--max-tokens", "300", "--json", str(results)]
    assert main(["evaluate", str(gemma), *words]) == 0
    assert {one["name"] for one in json.loads(results.read_text())["members"]} >= {"S", "XL"}
    kinds = []
    for member in ("ffn=0.5", "heads=0.5", "layers=1:3"):
        out = tmp_path / member
        assert main(["extract", str(gemma), "--granularity", member, "--out", str(out)]) == 0
        fields = json.loads((out / "config.json").read_text())
        assert fields["architectures"] == ["Gemma3ForCausalLM"]
        kinds.append(fields["layer_types"])
    assert kinds[-1] == ["full_attention", "sliding_attention"]


def test_an_import_keeps_every_weight(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "imported"
    assert main(["import", str(gemma), "--out", str(out)]) == 0
    assert "equal in stock transformers" in capsys.readouterr().out
    ours, theirs = (weights_of(load_model(path).model) for path in (out, gemma))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_neurons_are_ordered_and_the_model_is_the_same(gemma: Path, text: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "ordered", ["--data", str(text), "--drop", "0", "--max-tokens", "200"]
    assert main(["order", str(gemma), "--out", str(out), *words]) == 0
    ours, theirs = load_model(out).model, load_model(gemma).model
    tokens_BT = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT), theirs(tokens_BT), atol=1e-4, rtol=0)
    assert not torch.equal(ours.state_dict()[GATE], theirs.state_dict()[GATE])


@pytest.mark.parametrize("how", ["joint", "owned"])
def test_a_run_begins_from_it_and_its_members_come_out(
    how: str, gemma: Path, text: Path, tmp_path: Path
) -> None:
    settings = {
        "model.from": gemma,
        "model.train": how,
        "data.source": text,
        "data.cache_dir": tmp_path / "cache",
        "data.sequence_length": 32,
        "data.valid_fraction": 0.1,
        "trainer.max_steps": 4,
        "trainer.batch_size": 4,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1,
        "trainer.checkpoint_every": 4,
        "trainer.accelerator": "cpu",
        "sampler.min_rows": 1,
        "tracking.wandb": "disabled",
        "tracking.tensorboard": "false",
        "owned.rank": 2,
        "dtype": "fp32",
    }
    keys = [f"{key}={value}" for key, value in settings.items()]
    family = "family={H: 'ffn=0.5', N: 'ffn=0.5,heads=0.5,layers=0:1:3', E: 'layers=0-1'}"
    assert main(["train", "--out", str(tmp_path / "run"), *keys, family]) == 0
    trained = load_model(tmp_path / "run" / "model")
    before = weights_of(load_model(gemma).model)
    kept = [torch.equal(tensor, before[name]) for name, tensor in weights_of(trained.model).items()]
    assert all(kept) if how == "owned" else not any(kept)
    norms = [name for one in trained.model.members for name, _ in one.named_parameters() if "norm" in name]
    assert any("post_feedforward_layernorm" in name for name in norms)
    for member in ("H", "N", "E"):
        out = tmp_path / member
        assert main(["extract", str(trained.path), "--granularity", member, "--out", str(out)]) == 0
    view = View(trained.model, Granularity.parse("N", trained.family))
    tokens_BT = torch.arange(40)[None]
    with torch.no_grad():
        ours_BTV, theirs_BTV = view(tokens_BT), load_stock(tmp_path / "N")(tokens_BT).logits
    atol = 1e-4 * float(theirs_BTV.abs().max())
    torch.testing.assert_close(ours_BTV, theirs_BTV, atol=atol, rtol=0)
    assert (
        generate(trained.path, "--prompt", PROMPTS[0], "--draft", "N")["ids"]
        == (generate(trained.path, "--prompt", PROMPTS[0], "--draft", "none")["ids"])
    )


def test_its_distribution_is_verified(gemma: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--effort", "quick", "--trials", "100", "--max-new-tokens", "8", "--dtype", "fp32"]
    assert main(["verify", str(gemma), *words, "--verifier", "block"]) == 0
    assert "hold" in capsys.readouterr().out
