"""What llama.cpp reads from our files is the same model; skipped where its Python package is missing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bench.llama import LlamaEngine, Llamas, is_installed, open_llama
from models.config import ElasticConfig
from models.decode.sampling import SamplingParams
from models.elastic import ElasticLM
from models.gguf import DTYPES, holds, write_gguf

pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="needs the extra `llama`"),
    # It forgets itself when the interpreter ends, and its own close() fails then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# fp32 on both sides, relative to the largest logit: other orders of summing, and other exponentials.
LOGITS_TOLERANCE = 1e-4
GREEDY = SamplingParams()
TOKENS = [7, 3, 60, 21, 21, 5, 40, 2, 2, 63]


def make_model(config: ElasticConfig, **changes: Any) -> ElasticLM:
    """Every parameter is random, biases and norms included."""
    model = ElasticLM(dataclasses.replace(config, **changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "head_dim": 16, "rope_theta": 500.0},
        {"attention_bias": True},
        {"qk_norm": True},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": False},
    ],
    ids=["llama", "untied", "qwen2", "qwen3", "odd heads"],
)
@torch.no_grad()
def test_llama_cpp_computes_our_logits(
    tiny_config: ElasticConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model(tiny_config, **changes)
    float32 = 0  # of keys and values, which are fp16 otherwise
    llama = open_llama(
        write_gguf(model, tmp_path / "m.gguf", dtype="fp32"),
        32,
        logits_all=True,
        type_k=float32,
        type_v=float32,
    )
    llama.eval(TOKENS)
    theirs_TV = torch.tensor(llama.scores[: len(TOKENS)])
    ours_TV = model(torch.tensor([TOKENS]))[0]
    assert torch.equal(ours_TV.argmax(-1), theirs_TV.argmax(-1))
    assert float((ours_TV - theirs_TV).abs().max() / ours_TV.abs().max()) < LOGITS_TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_is_smaller_and_runs(tiny_config: ElasticConfig, tmp_path: Path, dtype: str) -> None:
    path = write_gguf(make_model(tiny_config), tmp_path / "m.gguf", dtype=dtype)
    engine = LlamaEngine(llamas=Llamas(path, 20), params=GREEDY)
    assert len(engine.decode(TOKENS, max_new_tokens=4, seed=0).ids) == 4
    whole = write_gguf(make_model(tiny_config), tmp_path / "whole.gguf", dtype="fp32").stat().st_size
    assert path.stat().st_size < whole or dtype == "fp32"


def test_int8_needs_whole_blocks(tiny_config: ElasticConfig) -> None:
    odd = dataclasses.replace(tiny_config, intermediate_size=40)
    assert [holds(tiny_config, "int8"), holds(odd, "int8"), holds(odd, "bf16")] == [True, False, True]


def test_plain_and_drafted_write_the_same_and_a_prompt_is_read_each_time(
    tiny_config: ElasticConfig, tmp_path: Path
) -> None:
    model = make_model(tiny_config)
    path = write_gguf(model, tmp_path / "m.gguf", dtype="fp32")
    small = write_gguf(make_model(tiny_config, num_hidden_layers=1), tmp_path / "s.gguf", dtype="fp32")
    engines = {
        "plain": LlamaEngine(llamas=Llamas(path, 30), params=GREEDY),
        "itself": LlamaEngine(llamas=Llamas(path, 30, path), params=GREEDY, gamma=4),
        "small": LlamaEngine(llamas=Llamas(path, 30, small), params=GREEDY, gamma=4),
    }
    samples = {name: engine.decode(TOKENS, max_new_tokens=11, seed=0) for name, engine in engines.items()}
    again = {name: engine.decode(TOKENS, max_new_tokens=11, seed=0) for name, engine in engines.items()}
    plain = samples["plain"].ids
    assert all(sample.ids == plain for sample in [*samples.values(), *again.values()])
    assert samples["plain"].passes == 10
    # It drafts for itself: two rounds of 4 and one more token each.
    assert samples["itself"].passes == again["itself"].passes == 2


def test_sampling_is_seeded(tiny_config: ElasticConfig, tmp_path: Path) -> None:
    path = write_gguf(make_model(tiny_config), tmp_path / "m.gguf", dtype="fp32")
    engine = LlamaEngine(llamas=Llamas(path, 40), params=SamplingParams(temperature=1.0))
    one, same, other = (engine.decode(TOKENS, max_new_tokens=20, seed=seed).ids for seed in (1, 1, 2))
    assert one == same != other
