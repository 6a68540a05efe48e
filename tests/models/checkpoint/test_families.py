"""Every kind of stock model opens as what transformers computes: each RoPE, grouped heads, tied or not.

The cases are a table in which each pair of (architecture, RoPE, heads, tied) stands at least once.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from models.checkpoint.folder import load_model
from models.checkpoint.gemma3 import GEMMA3
from models.checkpoint.huggingface_config import ARCHITECTURES
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.kernels.build import library
from models.packed.quantize import pack

TOLERANCE = 1e-4
"""fp32 logits relative to the largest: stock attention and norms add in another order."""
ORIGINAL, LENGTH = 24, 60
"""The context before positions were stretched, and one far beyond it."""
WINDOW = 7
"""The positions that Gemma's local layers read."""
STRETCHED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **STRETCHED},
    "linear": {"factor": 4.0},
    "yarn": STRETCHED,
}
HEADS = ((4, 1), (6, 2), (6, 3), (3, 3))
"""Query heads and groups."""
CASES = [
    (model_type, rope, HEADS[(i + k) % 4], (i + k // 2) % 2 == 0)
    for (i, model_type), (k, rope) in itertools.product(enumerate(ARCHITECTURES), enumerate(ROPES))
]


def make_stock(model_type: str, rope: str, heads: tuple[int, int], tied: bool, **fields: Any) -> Any:
    """Return a tiny stock model whose every parameter is random, biases and norms included."""
    positions: dict[str, Any] = {"rope_type": rope, "rope_theta": 1000.0, **ROPES[rope]}
    if model_type == GEMMA3:  # of five layers the second and the fourth read all positions
        near = {"rope_type": "default", "rope_theta": 70.0}
        positions = {"full_attention": positions, "sliding_attention": near}
        windows = {"sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 10}
        fields = {**windows, **fields}
    config = AutoConfig.for_model(
        model_type,
        vocab_size=70,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=5,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=16,
        max_position_embeddings=4 * ORIGINAL,
        tie_word_embeddings=tied,
        rope_parameters=positions,
        **{"sliding_window": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **fields},
    )
    stock: Any = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.2, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return stock


def token_by_token(model: ElasticLM, ids: list[int], num_prompt: int) -> Tensor:
    """Return logits [T, V] of a prompt, then of one token after another over the cache."""
    cache, rows = model.new_cache(len(ids)), []
    for start, end in [(0, num_prompt), *((at, at + 1) for at in range(num_prompt, len(ids)))]:
        rows.append(model.run([Request(ids[start:end], cache, end - start)]))
        cache.commit(end - start)
    return torch.cat(rows)


def in_steps(model: ElasticLM, ids: list[int], step: int) -> Tensor:
    """Return logits [T, V], a few tokens after another, beside another text that begins later."""
    caches = [model.new_cache(len(ids)) for _ in range(2)]
    rows = []
    for start in range(0, len(ids), step):
        new = ids[start : start + step]
        requests = [Request(new, caches[0], len(new))]
        if start >= step:
            requests.append(Request(ids[: len(new)], caches[1], 1))
        rows.append(model.run(requests)[: len(new)])
        for one in requests:
            one.cache.commit(len(one.ids))
    return torch.cat(rows)


def assert_equal(stock: Any, folder: Path) -> None:
    ids = torch.randint(70, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    theirs_TV = stock(torch.tensor([ids])).logits[0]
    ours = load_model(folder).model
    compiled = pack(load_model(folder, mapped=True).model, "fp32")
    runs_on_torch = ours.config.layer_types is not None
    assert compiled.can_draw == (library() is not None and not runs_on_torch)
    found = {
        "whole": ours(torch.tensor([ids]))[0],
        "token by token": token_by_token(ours, ids, 1),
        "compiled": token_by_token(compiled, ids, LENGTH),
        "compiled, token by token": token_by_token(compiled, ids, ORIGINAL),
        "in steps of another length than the window": in_steps(ours, ids, 5),
    }
    for way, ours_TV in found.items():
        difference = float((ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max())
        assert difference < TOLERANCE, way


@pytest.mark.parametrize(("model_type", "rope", "heads", "tied"), CASES)
@torch.inference_mode()
def test_logits_are_those_of_transformers_with_a_cache_and_without(
    model_type: str, rope: str, heads: tuple[int, int], tied: bool, tmp_path: Path
) -> None:
    stock = make_stock(model_type, rope, heads, tied)
    stock.save_pretrained(tmp_path)
    assert_equal(stock, tmp_path)


def test_each_pair_of_properties_stands_in_a_case() -> None:
    properties = (list(ARCHITECTURES), list(ROPES), HEADS, (True, False))
    for (i, some), (k, others) in itertools.combinations(enumerate(properties), 2):
        assert {(case[i], case[k]) for case in CASES} == set(itertools.product(some, others))


@torch.inference_mode()
def test_a_folder_of_several_files_and_several_ends_opens(tmp_path: Path) -> None:
    stock = make_stock("llama", "yarn", (6, 2), tied=False, eos_token_id=[2, 5, 9])
    stock.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert_equal(stock, tmp_path)
    assert load_model(tmp_path).model.config.eos_token_ids == (2, 5, 9)
