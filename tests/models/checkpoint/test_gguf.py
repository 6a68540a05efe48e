"""A file holds the model that was written, and llama.cpp computes the same; skipped without its packages."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base.errors import NestlingError, UsageError
from models.bench.llama import LlamaEngine, Llamas, is_installed, open_llama
from models.checkpoint.gguf import (
    DTYPES,
    OURS,
    TOKENIZER_MODEL,
    architecture_of,
    check_gguf,
    count_file_bytes,
    holds,
    is_ours,
    write_gguf,
)
from models.checkpoint.weights import weights_of
from models.decode.sampling.params import SamplingParams
from models.elastic.config import ElasticConfig
from models.elastic.count import count_parameters
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.rope_scaling import RopeScaling
from models.elastic.view import View

pytestmark = [
    # It forgets itself when the interpreter ends, and its own close() fails then.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
needs_llama = pytest.mark.skipif(not is_installed(), reason="needs the extra `llama`")

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


@needs_llama
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "head_dim": 16, "rope_theta": 500.0},
        {"attention_bias": True},
        {"qk_norm": True},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": False},
        {"no_rope_layers": (1, 1, 1, 0)},
    ],
    ids=["llama", "untied", "qwen2", "qwen3", "odd heads", "smollm3"],
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


UNEQUAL = Granularity(ffn=(1.0, 0.5, 0.75), heads=(0.5, 1.0, 0.5), layers=(0, 1, 3))
KINDS: dict[str, dict[str, Any]] = {
    "deci": {},
    "deci untied": {"tie_word_embeddings": False},
    "deci odd heads": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "deci llama3": {
        "rope_scaling": RopeScaling(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    },
    "openelm": {"qk_norm": True},
}


@needs_llama
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_llama_cpp_computes_the_logits_of_unequal_layers(
    tiny_config: ElasticConfig, tmp_path: Path, kind: str
) -> None:
    view = View(make_model(tiny_config, **KINDS[kind]), UNEQUAL)
    path = write_gguf(view, tmp_path / "m.gguf", dtype="fp32")
    llama = open_llama(path, 32, logits_all=True, type_k=0, type_v=0)
    llama.eval(TOKENS)
    theirs_TV = torch.tensor(llama.scores[: len(TOKENS)])
    ours_TV = view(torch.tensor([TOKENS]))[0]
    assert torch.equal(ours_TV.argmax(-1), theirs_TV.argmax(-1))
    assert float((ours_TV - theirs_TV).abs().max() / ours_TV.abs().max()) < LOGITS_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_layers_have_lists_of_widths_and_true_shapes(
    tiny_config: ElasticConfig, tmp_path: Path, kind: str
) -> None:
    import gguf

    view = View(make_model(tiny_config, **KINDS[kind]), UNEQUAL)
    path = write_gguf(view, tmp_path / "m.gguf", dtype="fp32")
    reader, name = gguf.GGUFReader(path), kind.split(maxsplit=1)[0]
    fields = {key: field.contents() for key, field in reader.fields.items()}
    each = view.model.config.heads_per_group
    assert fields["general.architecture"] == name == architecture_of(view)
    assert fields[f"{name}.feed_forward_length"] == [64, 32, 48]
    assert fields[f"{name}.attention.head_count"] == [each, 2 * each, each]
    assert fields[f"{name}.attention.head_count_kv"] == [1, 2, 1]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight"] == (32, 32)
    head = view.model.config.head_dim
    if name == "openelm":
        assert shapes["blk.2.attn_qkv.weight"] == (32, (each + 2) * head)
    else:
        assert shapes["blk.2.attn_q.weight"] == (32, each * head)
    numbers = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != "rope_freqs.weight")
    assert numbers == count_parameters(view.model.config, UNEQUAL)
    assert count_file_bytes(view, "fp32") == sum(int(tensor.n_bytes) for tensor in reader.tensors)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"qk_norm": True, "tie_word_embeddings": False}]
)
def test_unequal_layers_that_llama_cpp_cannot_hold_are_refused(
    tiny_config: ElasticConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="holds no unequal layers"):
        write_gguf(View(make_model(tiny_config, **changes), UNEQUAL), tmp_path / "m.gguf", dtype="fp32")


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("layers=1-3", {}),
        ("ffn=1:0.5:1:1", {}),
        ("full", {"no_rope_layers": (1, 1, 0, 1)}),
        ("full", {"rope_scaling": KINDS["deci llama3"]["rope_scaling"]}),
    ],
)
def test_layers_without_positions_where_llama_cpp_has_some_are_refused(
    tiny_config: ElasticConfig, tmp_path: Path, text: str, changes: dict[str, Any]
) -> None:
    model = make_model(tiny_config, **{"no_rope_layers": (1, 1, 1, 0), **changes})
    with pytest.raises(UsageError, match="only if every fourth has none"):
        write_gguf(View(model, Granularity.parse(text)), tmp_path / "m.gguf", dtype="fp32")


@needs_llama
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_reads_back_equal_and_a_flipped_bit_is_named(
    tiny_config: ElasticConfig, tmp_path: Path, dtype: str
) -> None:
    model, metadata = make_model(tiny_config), {TOKENIZER_MODEL: "no_vocab", OURS: "ffn=0.5"}
    path = write_gguf(model, tmp_path / "m.gguf", dtype=dtype, metadata=metadata)
    assert check_gguf(model, path, dtype=dtype, metadata=metadata) == len(list(model.parameters()))
    assert is_ours(path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in the last tensor
    path.write_bytes(content)
    with pytest.raises(NestlingError, match="reads back otherwise"):
        check_gguf(model, path, dtype=dtype, metadata=metadata)
    with pytest.raises(NestlingError, match=OURS):
        check_gguf(model, path, dtype=dtype, metadata={OURS: "ffn=0.25"})


def test_the_file_holds_the_weights_with_the_rows_of_query_and_key_heads_by_turns(
    tiny_config: ElasticConfig, tmp_path: Path
) -> None:
    import gguf

    model = make_model(tiny_config)
    reader = gguf.GGUFReader(write_gguf(model, tmp_path / "m.gguf", dtype="fp32"))
    theirs = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    ours, head_dim = weights_of(model), tiny_config.head_dim
    for layer in range(tiny_config.num_hidden_layers):
        prefix, theirs_of = f"model.layers.{layer}", f"blk.{layer}"
        assert torch.equal(theirs[f"{theirs_of}.ffn_down.weight"], ours[f"{prefix}.mlp.down_proj.weight"])
        assert torch.equal(theirs[f"{theirs_of}.attn_v.weight"], ours[f"{prefix}.self_attn.v_proj.weight"])
        our_HKD = ours[f"{prefix}.self_attn.q_proj.weight"].unflatten(0, (-1, head_dim))
        their_HKD = theirs[f"{theirs_of}.attn_q.weight"].unflatten(0, (-1, head_dim))
        assert torch.equal(their_HKD[:, 0::2], our_HKD[:, : head_dim // 2])
        assert torch.equal(their_HKD[:, 1::2], our_HKD[:, head_dim // 2 :])


def test_another_file_is_not_ours(tiny_config: ElasticConfig, tmp_path: Path) -> None:
    path = write_gguf(make_model(tiny_config), tmp_path / "m.gguf", dtype="fp32")
    assert not is_ours(path)
    for content in (b"", b"years of work", path.read_bytes()[:100]):
        path.write_bytes(content)
        assert not is_ours(path)


@needs_llama
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


@needs_llama
def test_sampling_is_seeded(tiny_config: ElasticConfig, tmp_path: Path) -> None:
    path = write_gguf(make_model(tiny_config), tmp_path / "m.gguf", dtype="fp32")
    engine = LlamaEngine(llamas=Llamas(path, 40), params=SamplingParams(temperature=1.0))
    one, same, other = (engine.decode(TOKENS, max_new_tokens=20, seed=seed).ids for seed in (1, 1, 2))
    assert one == same != other
