"""Invariant 1: view(g)(x) == extract(g)(x) == stock transformers on the extracted folder(x)."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base.errors import UsageError
from models.checkpoint.extract import LOGITS_TOLERANCE, Parity, extract, verify_extraction
from models.checkpoint.folder import Member, ModelFolder, load_model, save_model
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY, FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from tests.models.checkpoint.test_gemma3 import GEMMA3

MEMBERS = [
    *DEFAULT_FAMILY,
    "heads=0.5",
    "layers=0:1",
    "layers=1:3",
    "ffn=0.3,heads=0.5,layers=0:2:3",
    "ffn=0.5:0.5,layers=0:3",
]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {"no_rope_layers": (1, 0, 1, 0)},
    "gemma3_text": GEMMA3,
    # 3 of 6 groups of one head: 3 heads do not divide a hidden size of 32, nor do the 6.
    "odd heads": {"num_attention_heads": 6, "num_key_value_heads": 6, "tie_word_embeddings": False},
}


def make_folder(path: Path, config: ElasticConfig, **changes: Any) -> ModelFolder:
    """A saved family; every parameter is random, biases and norms included."""
    model = ElasticLM(dataclasses.replace(config, **changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return load_model(save_model(path, model))


@pytest.mark.parametrize("text", MEMBERS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_view_extraction_and_stock_transformers_agree(
    tiny_config: ElasticConfig, tmp_path: Path, kind: str, text: str
) -> None:
    family = make_folder(tmp_path / "model", tiny_config, **KINDS[kind])
    member = Granularity.parse(text)
    out = extract(family, member, tmp_path / "out")
    assert verify_extraction(family, member, out, num_new_tokens=8).holds
    tokens_BT = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(4))
    view_BTV, ours_BTV = View(family.model, member)(tokens_BT), load_model(out).model(tokens_BT)
    assert torch.equal(view_BTV.argmax(-1), ours_BTV.argmax(-1))
    atol = LOGITS_TOLERANCE * float(view_BTV.abs().max())
    torch.testing.assert_close(view_BTV, ours_BTV, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("kind", "text", "architecture"),
    [
        ("llama", "S", "LlamaForCausalLM"),
        ("llama", "heads=0.5", "LlamaForCausalLM"),
        ("odd heads", "heads=0.5", "MistralForCausalLM"),
        ("qwen2", "S", "Qwen2ForCausalLM"),
        ("qwen3", "heads=0.5", "Qwen3ForCausalLM"),
        ("smollm3", "S", "SmolLM3ForCausalLM"),
        ("smollm3", "layers=0:2", "LlamaForCausalLM"),  # the two that have positions
    ],
)
def test_each_member_comes_out_as_the_right_stock_architecture(
    tiny_config: ElasticConfig, tmp_path: Path, kind: str, text: str, architecture: str
) -> None:
    family = make_folder(tmp_path / "model", tiny_config, **KINDS[kind])
    out = extract(family, Granularity.parse(text), tmp_path / "out")
    fields = json.loads((out / "config.json").read_text())
    assert fields["architectures"] == [architecture]
    assert fields["head_dim"] == tiny_config.head_dim
    assert fields.get("sliding_window") is None


@pytest.mark.parametrize(("text", "rotated"), [("full", [1, 0, 1, 0]), ("layers=1-3", [0, 1, 0])])
def test_layers_without_positions_stay_so_when_others_are_dropped(
    tiny_config: ElasticConfig, tmp_path: Path, text: str, rotated: list[int]
) -> None:
    family = make_folder(tmp_path / "model", tiny_config, **KINDS["smollm3"])
    out = extract(family, Granularity.parse(text), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["no_rope_layers"] == rotated


OPEN_AS_A_STRANGER = """
import sys, torch, transformers
for ours in ("models", "train"):
    try:
        __import__(ours)
    except ImportError:
        continue
    raise SystemExit(f"{ours} can be imported here, which makes this test void")
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False)
print(*ids[0].tolist())
"""


def test_a_process_without_our_code_gets_the_same_ids(tiny_config: ElasticConfig, tmp_path: Path) -> None:
    family = make_folder(tmp_path / "model", tiny_config)
    member = Granularity.parse("ffn=0.25,heads=0.5,layers=0:2")
    out = extract(family, member, tmp_path / "out")
    # A meta-path finder installed by an editable install would make `models` importable: -S leaves it out.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"import sys; sys.path.insert(0, {site!r})" + OPEN_AS_A_STRANGER
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    tokens_BT = torch.tensor([[1, 2, 3]])
    for _ in range(20):
        next_B1 = View(family.model, member)(tokens_BT)[:, -1:].argmax(-1)
        tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
    assert result.stdout.split() == [str(token) for token in tokens_BT[0].tolist()]


def test_an_extraction_knows_where_it_came_from(tiny_model: ElasticLM, tmp_path: Path) -> None:
    known = Member(name="S", granularity="ffn=0.125", parameters=1, loss=1.5, perplexity=4.5, alpha=0.7)
    path = save_model(tmp_path / "model", tiny_model, members=[known], provenance={"commit": "abc"})
    out = extract(load_model(path), DEFAULT_FAMILY["S"], tmp_path / "out")
    opened = load_model(out)
    count = sum(parameter.numel() for parameter in opened.model.parameters())
    assert opened.family == {"full": FULL}
    assert opened.members == [
        Member(name="full", granularity="full", parameters=count, loss=1.5, perplexity=4.5)
    ]
    assert opened.provenance == {
        "parent": str(path),
        "parent_parameters": sum(parameter.numel() for parameter in tiny_model.parameters()),
        "granularity": "ffn=0.125",
        "parameters": count,
        "form": "stock",
        "parent_provenance": {"commit": "abc"},
    }


def test_tokenizer_and_generation_files_go_along_unchanged(tiny_model: ElasticLM, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", tiny_model)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (path / name).write_text('{"eos_token_id": [1, 2]}')
    (path / "chat_template.jinja").write_text("hello")
    out = extract(load_model(path), FULL, tmp_path / "out")
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (path / name).read_bytes()


def test_the_dtype_on_disk_is_kept_and_verified(tiny_model: ElasticLM, tmp_path: Path) -> None:
    family = load_model(save_model(tmp_path / "model", tiny_model.to(torch.bfloat16)))
    out = extract(family, DEFAULT_FAMILY["M"], tmp_path / "out")
    assert load_model(out).model.lm_head.weight.dtype == torch.bfloat16
    assert verify_extraction(family, DEFAULT_FAMILY["M"], out).holds


def test_verification_sees_a_wrong_weight(tiny_model: ElasticLM, tmp_path: Path) -> None:
    family = load_model(save_model(tmp_path / "model", tiny_model))
    out = extract(family, DEFAULT_FAMILY["M"], tmp_path / "out")
    with torch.no_grad():
        family.model.model.norm.weight[0] += 0.01
    parity = verify_extraction(family, DEFAULT_FAMILY["M"], out)
    assert parity.difference > LOGITS_TOLERANCE
    assert not parity.holds


def test_equal_logits_do_not_excuse_other_ids() -> None:
    assert not Parity(num_tokens=1, ids_equal=False, difference=0.0).holds


def test_a_granularity_that_does_not_fit_is_refused(tiny_model: ElasticLM, tmp_path: Path) -> None:
    family = load_model(save_model(tmp_path / "model", tiny_model))
    with pytest.raises(UsageError, match="keeps layer 7"):
        extract(family, Granularity.parse("layers=7"), tmp_path / "out")


def test_an_extraction_replaces_an_extraction_and_nothing_else(tiny_model: ElasticLM, tmp_path: Path) -> None:
    family = load_model(save_model(tmp_path / "run" / "model", tiny_model))
    other = save_model(tmp_path / "other", tiny_model)
    out = extract(family, DEFAULT_FAMILY["S"], tmp_path / "out")
    extract(family, DEFAULT_FAMILY["M"], out)
    assert load_model(out).provenance["granularity"] == "ffn=0.25"
    for place, why in (
        (family.path, "holds the model itself"),
        (family.path / ".." / "model", "holds the model itself"),
        (tmp_path / "run", "is not ours to replace"),
        (other, "holds a family"),
    ):
        with pytest.raises(UsageError, match=why):
            extract(family, DEFAULT_FAMILY["S"], place)
    assert load_model(family.path).family == load_model(other).family == dict(DEFAULT_FAMILY)
