"""Members with unequal layers on disk: view, ragged and padded extractions, and transformers agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.base.errors import NestlingError, UsageError
from models.checkpoint.extract import LOGITS_TOLERANCE, extract, verify_extraction
from models.checkpoint.folder import ModelFolder, load_model, save_model
from models.checkpoint.huggingface import load_stock
from models.checkpoint.layout import lay_out
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from tests.models.checkpoint.test_gemma3 import GEMMA3

UNEQUAL = Granularity(ffn=(1.0, 0.25, 0.5), heads=(0.5, 1.0, 0.5), layers=(0, 1, 3))
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {"no_rope_layers": (1, 0, 1, 0)},
    "gemma3_text": GEMMA3,
    "untied": {"tie_word_embeddings": False},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 3},
}


def make_folder(path: Path, **fields: Any) -> ModelFolder:
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    config = ElasticConfig(**(shape | fields), initializer_range=0.3)
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return load_model(save_model(path, model.eval()))


@pytest.mark.parametrize("form", ["ragged", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_agrees_with_transformers(kind: str, form: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", **KINDS[kind])
    groups = folder.model.config.num_key_value_heads
    heads = (1 / groups, 1.0, 1 / groups)
    if kind == "gemma3_text" and form == "ragged":  # whose class wants one number of heads
        heads = (1 / groups,) * 3
    unequal = Granularity(ffn=(1.0, 0.25, 0.5), heads=heads, layers=(0, 1, 3))
    out = extract(folder, unequal, tmp_path / "out", form=form)
    assert verify_extraction(folder, unequal, out).holds
    fields = json.loads((out / "config.json").read_text())
    assert ("per_layer_config" in fields) == (form == "ragged")


def test_a_ragged_folder_has_true_shapes_and_the_default_is_ragged(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    out = extract(folder, UNEQUAL, tmp_path / "out")
    view = View(folder.model, UNEQUAL)
    layout = lay_out(view)
    assert (
        layout.parameters == sum(tensor.numel() for tensor in load_stock(out).state_dict().values()) - 40 * 32
    )
    assert (out / "model.safetensors").stat().st_size < (folder.path / "model.safetensors").stat().st_size
    fields = json.loads((out / "config.json").read_text())
    assert fields["per_layer_config"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1},
        "1": {"intermediate_size": 8},
        "2": {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    }


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_it_opens_here_as_well(form: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    out = extract(folder, UNEQUAL, tmp_path / "out", form=form)
    tokens_BT = torch.arange(20)[None]
    ours = View(folder.model, UNEQUAL)(tokens_BT)
    torch.testing.assert_close(load_model(out).model(tokens_BT), ours)


def test_padding_says_what_it_wastes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    layout = lay_out(View(folder.model, UNEQUAL), "padded")
    # b [3 d sum(F_max - F_i) + (2 g + 2) h d sum(G_max - G_i)] with d 32, h 8, g 2
    assert layout.wasted == 3 * 32 * (24 + 16) + (2 * 2 + 2) * 8 * 32 * 2


def test_without_remote_code_transformers_names_the_field(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = make_folder(tmp_path / "model")
    out = extract(folder, UNEQUAL, tmp_path / "out")
    with pytest.raises(Exception, match="per-layer attribute"):
        LlamaForCausalLM.from_pretrained(out)


def test_only_our_own_modelling_file_is_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    out = extract(folder, UNEQUAL, tmp_path / "out")
    with (out / "modeling_nestling.py").open("a") as file:
        file.write("\nraise SystemExit\n")
    with pytest.raises(NestlingError, match="is not run"):
        load_stock(out)


@pytest.mark.parametrize("what", ["model", "config", "generate"])
def test_nothing_beside_our_own_modelling_file_is_run(what: str, tmp_path: Path) -> None:
    out = extract(make_folder(tmp_path / "model"), UNEQUAL, tmp_path / "out")
    path, fields = out / "other.py", json.loads((out / "config.json").read_text())
    if what == "model":
        fields["auto_map"]["AutoModelForCausalLM"] = "other.NestlingLlamaForCausalLM"
    elif what == "config":
        fields["auto_map"]["AutoConfig"] = "somebody/model--other.Config"
    else:
        path = out / "custom_generate" / "generate.py"
        path.parent.mkdir()
    if what != "config":
        path.write_text("raise SystemExit\n")
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(NestlingError, match="run code that this release does not write"):
        load_stock(out)


def test_a_form_that_does_not_hold_it_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    with pytest.raises(UsageError, match="--form stock"):
        extract(folder, UNEQUAL, tmp_path / "out", form="stock")
    with pytest.raises(UsageError, match="--form zip"):
        extract(folder, UNEQUAL, tmp_path / "out", form="zip")
    assert not (tmp_path / "out").exists()


def test_what_a_comparison_refuses_leaves_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")

    def refuse(*_: object) -> None:
        raise NestlingError("differs")

    with pytest.raises(NestlingError, match="differs"):
        extract(folder, UNEQUAL, tmp_path / "out", finish=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@st.composite
def members(draw: st.DrawFn) -> tuple[str, Granularity]:
    """Draw a kind of model, and any member of it."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    num_groups = KINDS[kind].get("num_key_value_heads", 2)
    layers = tuple(sorted(draw(st.sets(st.integers(0, 3), min_size=1))))
    ffn = st.integers(1, 32).map(lambda width: width / 32)
    groups = st.integers(1, num_groups).map(lambda count: count / num_groups)
    if kind == "gemma3_text":  # whose class wants one number of heads
        heads = (draw(groups),) * len(layers)
    else:
        heads = tuple(draw(groups) for _ in layers)
    return kind, Granularity(ffn=tuple(draw(ffn) for _ in layers), heads=heads, layers=layers)


@pytest.mark.parametrize("num_members", [12, pytest.param(500, marks=pytest.mark.slow)])
@torch.no_grad()
def test_any_granularity_agrees_in_place_extracted_and_in_transformers(
    num_members: int, tmp_path: Path
) -> None:
    folders = {kind: make_folder(tmp_path / kind, **fields) for kind, fields in KINDS.items()}
    tokens_BT = torch.arange(20).reshape(2, 10)

    @settings(max_examples=num_members, suppress_health_check=[HealthCheck.too_slow])
    @given(members())
    def check(member: tuple[str, Granularity]) -> None:
        kind, granularity = member
        folder, view = folders[kind], View(folders[kind].model, granularity)
        view_BTV = view(tokens_BT)
        for form in ("stock",) if view.plan.is_uniform else ("ragged", "padded"):
            out = extract(folder, granularity, tmp_path / "out", form=form)
            assert verify_extraction(folder, granularity, out, num_new_tokens=4).holds
            atol = LOGITS_TOLERANCE * float(view_BTV.abs().max())
            torch.testing.assert_close(load_model(out).model(tokens_BT), view_BTV, atol=atol, rtol=0)

    check()
