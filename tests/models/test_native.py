"""A pass as one compiled call: what torch computes, and the same bits for a token in every pass."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.cache import KVCache
from models.compiled.build import library
from models.config import ElasticConfig
from models.elastic import ElasticLM
from models.granularity import FULL, Granularity
from models.native import Head, NativeStep, Tokens, native_step

IDS = [(7 * position + 3) % 64 for position in range(60)]
MEMBERS = ("full", "ffn=0.25", "ffn=0.3,heads=0.5,layers=0:3", "layers=0-1", "ffn=0.1:0.5:0.9:1.0")
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "vocab_size": 75},
    "biases and head norms": {"attention_bias": True, "qk_norm": True},
    "one group": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 40, "intermediate_size": 83},
}
# Of the norm; the others have 8 bits.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.int8: 0.06}


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if library() is None:
        pytest.skip("needs a C compiler")


def make_model(config: ElasticConfig, dtype: torch.dtype = torch.float32, **fields: Any) -> ElasticLM:
    model = ElasticLM(dataclasses.replace(config, **fields))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.to(dtype).eval()


def make_step(model: ElasticLM, dtype: torch.dtype) -> NativeStep:
    step = native_step(model, dtype)
    assert step is not None
    return step


def new_cache(model: ElasticLM, num_positions: int = 64) -> KVCache:
    dtype = model.model.embed_tokens.weight.dtype
    return KVCache(model.config, num_positions=num_positions, dtype=dtype)


def kept(cache: KVCache, num_layers: int) -> Tensor:
    return torch.stack([torch.stack(cache.read(layer)) for layer in range(num_layers)])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("text", MEMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_keys_and_values_are_torchs(
    shape: str, text: str, dtype: torch.dtype, tiny_config: ElasticConfig
) -> None:
    if shape == "one group" and "heads" in text:
        pytest.skip("half of one group is one group")
    stored = torch.float32 if dtype == torch.int8 else dtype
    model, member = make_model(tiny_config, stored, **SHAPES[shape]), Granularity.parse(text)
    exact = copy.deepcopy(model).float()
    ours, theirs = new_cache(model), new_cache(exact)
    expected_TV = exact(torch.tensor([IDS]), member, theirs)[0]
    logits_TV = make_step(model, dtype)([Tokens(IDS, ours, len(IDS))], member)
    for cache in (ours, theirs):
        cache.commit(len(IDS))
    for one, other in ((logits_TV, expected_TV), (kept(ours, 4), kept(theirs, 4))):
        assert (one - other).norm() < RTOL[dtype] * other.norm()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", RTOL)
def test_a_tokens_result_is_the_same_bits_in_every_pass(
    dtype: torch.dtype, tiny_config: ElasticConfig
) -> None:
    model = make_model(tiny_config, torch.float32 if dtype == torch.int8 else dtype)
    step, whole = make_step(model, dtype), new_cache(model)
    whole_TV = step([Tokens(IDS, whole, len(IDS))], FULL)
    whole.commit(len(IDS))
    before = torch.get_num_threads()
    for cuts, num_threads in (((1, 2, 3, 50), 1), ((13, 14, 27, 59), 3)):
        cache, companion = new_cache(model), new_cache(model)
        torch.set_num_threads(num_threads)
        try:
            for start, end in zip((0, *cuts), (*cuts, len(IDS)), strict=True):
                requests = [Tokens(IDS[start:end], cache, end - start), Tokens([5, 9], companion, 1)]
                rows_TV = step(requests, FULL)
                assert rows_TV[: end - start].equal(whole_TV[start:end])
                cache.commit(end - start)
                companion.commit(2)
        finally:
            torch.set_num_threads(before)
        assert kept(cache, 4).equal(kept(whole, 4))


@torch.inference_mode()
def test_only_the_last_tokens_are_scored_and_garbage_behind_them_changes_nothing(
    tiny_config: ElasticConfig,
) -> None:
    model = make_model(tiny_config)
    step, clean, dirty = make_step(model, torch.float32), new_cache(model), new_cache(model)
    for store in dirty._stores:
        for tensor in store:
            tensor.fill_(1e30)
    all_TV = step([Tokens(IDS[:20], clean, 20)], FULL)
    last_TV = step([Tokens(IDS[:20], dirty, 3)], FULL)
    assert last_TV.equal(all_TV[-3:])


@torch.inference_mode()
def test_members_share_what_is_packed_and_it_grows_when_a_larger_one_comes(
    tiny_config: ElasticConfig,
) -> None:
    model = make_model(tiny_config)
    step = make_step(model, torch.float32)
    small, sizes = Granularity.parse("ffn=0.5,layers=0-1"), []
    first_TV = step([Tokens(IDS, new_cache(model), 1)], small)
    for member in (small, Granularity.parse("ffn=0.25,layers=0"), FULL, small):
        step.prepare(member)
        sizes.append(step.num_bytes)
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    assert step([Tokens(IDS, new_cache(model), 1)], small).equal(first_TV)
    alone = make_step(model, torch.float32)
    alone.prepare(FULL)
    assert alone.num_bytes == sizes[2]


@torch.inference_mode()
def test_a_head_of_few_tokens_gives_those_tokens_logits(tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    step, ids = make_step(model, torch.float32), torch.tensor([3, 9, 40])
    few = nn.Linear(32, 3, bias=False)
    few.weight = nn.Parameter(model.lm_head.weight.detach()[ids])
    whole_TV = step([Tokens(IDS, new_cache(model), 4)], FULL)
    few_TN = step([Tokens(IDS, new_cache(model), 4)], FULL, Head(few))
    assert few_TN.equal(whole_TV[:, ids])


@torch.inference_mode()
def test_weights_may_be_in_another_dtype_than_the_store(tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    expected_TV = make_step(model, torch.float32)([Tokens(IDS, new_cache(model), 5)], FULL)
    half_TV = make_step(model, torch.bfloat16)([Tokens(IDS, new_cache(model), 5)], FULL)
    far = (half_TV - expected_TV).abs().max() / expected_TV.abs().max()
    assert 1e-4 < far < RTOL[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "fields"), [(torch.float64, {}), (torch.float16, {}), (torch.float32, {"hidden_size": 31})]
)
def test_what_it_cannot_run_is_left_to_torch(
    dtype: torch.dtype, fields: dict[str, int], tiny_config: ElasticConfig
) -> None:
    assert native_step(make_model(tiny_config, dtype, **fields), dtype) is None


@torch.inference_mode()
@pytest.mark.parametrize("token", [-1, 64])
def test_what_is_no_token_is_refused(token: int, tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    with pytest.raises(IndexError, match=f"from 0 to 63, got .*{token}"):
        make_step(model, torch.float32)([Tokens([1, token], new_cache(model), 1)], FULL)


@torch.inference_mode()
def test_it_computes_with_the_weights_that_it_was_made_of(tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    step = make_step(model, torch.float32)
    before_TV = step([Tokens(IDS, new_cache(model), 3)], FULL)
    model.to(torch.bfloat16)  # new storage for every weight
    cache = KVCache(model.config, num_positions=64)
    assert step([Tokens(IDS, cache, 3)], FULL).equal(before_TV)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", RTOL)
def test_a_call_that_goes_on_reads_what_is_likeliest(dtype: torch.dtype, tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config, torch.float32 if dtype == torch.int8 else dtype)
    step, few = make_step(model, dtype), torch.tensor([40, 3, 9])
    map_ = nn.Linear(32, 3, bias=False)
    map_.weight = nn.Parameter(model.lm_head.weight.detach()[few])
    for head, ids in ((Head(model.lm_head), torch.arange(64)), (Head(map_, few), few)):
        asked = [(IDS[:9], 2, 5), (IDS[:1], 1, 0), (IDS[:20], 1, 3)]
        at_once, in_turn = [[new_cache(model) for _ in asked] for _ in range(2)]
        requests = [Tokens(one[0], cache, *one[1:]) for one, cache in zip(asked, at_once, strict=True)]
        logits = step(requests, FULL, head).split([num_last + num_next for _, num_last, num_next in asked])
        for (tokens, num_last, num_next), cache, logits_TV in zip(asked, in_turn, logits, strict=True):
            expected_TV = step([Tokens(tokens, cache, num_last)], FULL, head)
            cache.commit(len(tokens))
            for _ in range(num_next):
                token = int(ids[expected_TV[-1].argmax()])
                more_TV = step([Tokens([token], cache, 1)], FULL, head)
                expected_TV = torch.cat([expected_TV, more_TV])
                cache.commit(1)
            assert logits_TV.equal(expected_TV)
        for (tokens, _, num_next), ours, theirs in zip(asked, at_once, in_turn, strict=True):
            ours.commit(len(tokens) + num_next)
            assert kept(ours, 4).equal(kept(theirs, 4))
