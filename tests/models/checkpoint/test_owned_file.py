"""What members own, on disk: it comes back, goes with the member, and damage is named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base.errors import NestlingError
from models.base.files import hash_files
from models.checkpoint.extract import extract, verify_extraction
from models.checkpoint.folder import load_model, save_model
from models.checkpoint.gguf import write_gguf
from models.checkpoint.huggingface import load_stock
from models.checkpoint.weights import hash_family
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.ownership import Ownership
from models.elastic.owning import own, owned_weights
from models.elastic.view import View

FAMILY = {
    "S": Granularity.parse("ffn=0.25"),
    "N": Granularity.parse("ffn=0.5,heads=0.5,layers=0:3"),
    "Mix": Granularity.parse("ffn=1:0.5:0.25:1"),
    "D": Granularity.parse("layers=0-1"),
    "XL": FULL,
}
TOKENS = torch.arange(20)[None]


def owning(model: ElasticLM) -> ElasticLM:
    own(model, FAMILY, Ownership(norms=True, rank=2, alpha=4.0), torch.Generator().manual_seed(1))
    for one in model.members:
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return model.eval()


@pytest.fixture
def folder(tiny_model: ElasticLM, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", owning(tiny_model), family=FAMILY)


def test_what_members_own_comes_back(tiny_model: ElasticLM, folder: Path) -> None:
    opened = load_model(folder).model
    ours, theirs = dict(owned_weights(tiny_model)), dict(owned_weights(opened))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for one in FAMILY.values():
        assert torch.equal(tiny_model(TOKENS, one), opened(TOKENS, one))
    assert {one.dtype for _, one in owned_weights(load_model(folder, dtype=torch.bfloat16).model)} == {
        torch.bfloat16
    }


def test_names_on_disk_are_those_of_the_stock_model_and_of_peft_behind_the_members(folder: Path) -> None:
    names = set(load_file(folder / "owned.safetensors"))
    assert "S.layers.0.input_layernorm.weight" in names
    assert "S.layers.3.mlp.gate_proj.lora_A.weight" in names
    assert "N.layers.3.self_attn.q_proj.lora_B.weight" in names
    assert "D.norm.weight" in names
    described = json.loads((folder / "nestling.json").read_text())
    assert described["format"] == 2
    sizes = {name: one["bytes"] for name, one in described["owned"]["members"].items()}
    assert sizes == {one.name: one.num_bytes for one in load_model(folder).model.members}


def test_the_folder_stays_a_stock_model(tiny_model: ElasticLM, folder: Path) -> None:
    logits_BTV = load_stock(folder)(TOKENS).logits
    torch.testing.assert_close(logits_BTV, tiny_model(TOKENS), atol=2e-5, rtol=0)


def test_a_folder_whose_members_own_nothing_is_as_it_was(tiny_model: ElasticLM, tmp_path: Path) -> None:
    path = save_model(tmp_path / "model", tiny_model, family=FAMILY)
    assert not (path / "owned.safetensors").exists()
    assert json.loads((path / "nestling.json").read_text())["format"] == 1


def test_a_save_leaves_nothing_of_what_members_owned_before(folder: Path) -> None:
    opened = load_model(folder)
    own(opened.model, FAMILY, Ownership())
    save_model(folder, opened.model, family=FAMILY)
    assert not (folder / "owned.safetensors").exists()
    assert not load_model(folder).model.members


@pytest.mark.parametrize(
    "fields", [{}, {"attention_bias": True}, {"qk_norm": True}, {"num_attention_heads": 6}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_member_is_extracted_with_what_it_owns(
    tiny_config: ElasticConfig, tmp_path: Path, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    """Invariant 1: the view, its extraction, and transformers on that."""
    model = ElasticLM(dataclasses.replace(tiny_config, **fields))
    model.init_weights(torch.Generator().manual_seed(0))
    folder = load_model(save_model(tmp_path / "model", owning(model).to(dtype), family=FAMILY))
    for name in ("S", "N", "Mix", "D"):
        out = extract(folder, FAMILY[name], tmp_path / name)
        assert verify_extraction(folder, FAMILY[name], out).holds, name
        assert not load_model(out).model.members


def test_a_gguf_file_holds_what_a_member_owns(folder: Path, tmp_path: Path) -> None:
    opened = load_model(folder)
    write_gguf(View(opened.model, FAMILY["S"]), tmp_path / "S.gguf", dtype="fp32")
    theirs = load_model(tmp_path / "S.gguf").model
    view = View(opened.model, FAMILY["S"])
    torch.testing.assert_close(theirs(TOKENS), view(TOKENS), atol=2e-5, rtol=0)


def test_the_hash_of_a_family_tells_what_members_own(folder: Path) -> None:
    before = hash_family(folder)
    opened = load_model(folder)
    with torch.no_grad():
        next(opened.model.members[0].parameters()).add_(1)
    assert hash_family(save_model(folder, opened.model, family=FAMILY)) != before


def _rename(folder: Path) -> None:
    change(folder, lambda owned: owned["members"].update(T=owned["members"].pop("S")))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    described = json.loads((folder / "nestling.json").read_text())
    edit(described["owned"])
    (folder / "nestling.json").write_text(json.dumps(described))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and have the description name the new file."""
    tensors = load_file(folder / "owned.safetensors")
    edit(tensors)
    save_file(tensors, folder / "owned.safetensors")
    change(folder, lambda owned: owned.update(sha256=hash_files(folder / "owned.safetensors")))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "owned.safetensors").unlink(), "owned.safetensors is missing"),
    "truncated": (
        lambda folder: (folder / "owned.safetensors").write_bytes(
            (folder / "owned.safetensors").read_bytes()[:500]
        ),
        "owned.safetensors is damaged",
    ),
    "foreign": (
        lambda folder: save_file(
            {name: tensor + 1 for name, tensor in load_file(folder / "owned.safetensors").items()},
            folder / "owned.safetensors",
        ),
        "is not the one that nestling.json was written with",
    ),
    "undescribed": (
        lambda folder: (folder / "nestling.json").unlink(),
        "holds what members own, but nestling.json does not name it",
    ),
    "another member": (_rename, "missing: T.layers.0.input_layernorm.weight"),
    "another rank": (lambda folder: change(folder, lambda one: one["members"]["S"].update(rank=3)), "shape"),
    "no rank": (
        lambda folder: change(folder, lambda one: one["members"]["S"].update(rank=True)),
        "S.rank=True is of the wrong kind",
    ),
    "too large a rank": (
        lambda folder: change(folder, lambda one: one["members"]["S"].update(rank=10**9)),
        "which cannot be",
    ),
    "no member": (
        lambda folder: change(folder, lambda one: one["members"]["S"].update(granularity="ffn=7")),
        "ffn=7",
    ),
    "no table": (lambda folder: change(folder, lambda one: one.update(members=3)), "is not a table"),
    "the full model": (
        lambda folder: change(folder, lambda one: one["members"]["S"].update(granularity="full")),
        "the full model owns nothing",
    ),
    "nan": (
        lambda folder: rewrite(folder, lambda tensors: tensors["S.norm.weight"].fill_(float("nan"))),
        "not finite",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_what_members_own_is_named_in_one_line(folder: Path, damage: str) -> None:
    spoil, expected = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(NestlingError) as caught:
        load_model(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
