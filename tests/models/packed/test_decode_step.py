"""A pass as one compiled call: what torch computes, and the same bits for a token in every pass."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.decode.sampling.params import SamplingParams, sampling_probs
from models.elastic.cache import KVCache
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Head, Request
from models.elastic.rope_scaling import RopeScaling
from models.kernels.build import library
from models.kernels.codes import FOUR_BITS, quantize
from models.kernels.sample import Draws
from models.packed.decode_step import (
    COMPUTED,
    LEFT_TO_TORCH,
    UNRELATED,
    DecodeStep,
    make_decode_step,
    supports,
)
from models.packed.quantize import pack

IDS = [(7 * position + 3) % 64 for position in range(60)]
MEMBERS = ("full", "ffn=0.25", "ffn=0.3,heads=0.5,layers=0:3", "layers=0-1", "ffn=0.1:0.5:0.9:1.0")
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "vocab_size": 75},
    "biases and head norms": {"attention_bias": True, "qk_norm": True},
    "one group": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 40, "intermediate_size": 83},
    "layers without positions": {"no_rope_layers": (0, 1, 1, 0)},
    "stretched": {"rope_scaling": RopeScaling(rope_type="linear", factor=3.0)},
}
# Of the norm; the others have 8 bits, or 4 in which torch's model has them, too.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.int8: 0.06, FOUR_BITS: 0.06}


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


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """Of the model that is packed in a dtype."""
    return dtype if dtype.is_floating_point else torch.float32


def make_step(model: ElasticLM, dtype: torch.dtype) -> DecodeStep:
    step = make_decode_step(model, dtype)
    assert step is not None
    return step


def round_weights(model: ElasticLM) -> None:
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            codes_OI, scales_O1 = quantize(linear.weight.detach(), 4)
            linear.weight = nn.Parameter(codes_OI * scales_O1)


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
    model, member = make_model(tiny_config, stored_as(dtype), **SHAPES[shape]), Granularity.parse(text)
    exact, step = copy.deepcopy(model).float(), make_step(model, dtype)
    if dtype == FOUR_BITS:
        round_weights(exact)
        step.prepare(FULL)  # a part has the scales of the whole then
    ours, theirs = new_cache(model), new_cache(exact)
    expected_TV = exact(torch.tensor([IDS]), member, theirs)[0]
    logits_TV = step([Request(IDS, ours, len(IDS))], member)
    for cache in (ours, theirs):
        cache.commit(len(IDS))
    for one, other in ((logits_TV, expected_TV), (kept(ours, 4), kept(theirs, 4))):
        assert (one - other).norm() < RTOL[dtype] * other.norm()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", RTOL)
def test_a_tokens_result_is_the_same_bits_in_every_pass(
    dtype: torch.dtype, tiny_config: ElasticConfig
) -> None:
    model = make_model(tiny_config, stored_as(dtype))
    step, whole = make_step(model, dtype), new_cache(model)
    whole_TV = step([Request(IDS, whole, len(IDS))], FULL)
    whole.commit(len(IDS))
    before = torch.get_num_threads()
    for cuts, num_threads in (((1, 2, 3, 50), 1), ((13, 14, 27, 59), 3)):
        cache, companion = new_cache(model), new_cache(model)
        torch.set_num_threads(num_threads)
        try:
            for start, end in zip((0, *cuts), (*cuts, len(IDS)), strict=True):
                requests = [Request(IDS[start:end], cache, end - start), Request([5, 9], companion, 1)]
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
    all_TV = step([Request(IDS[:20], clean, 20)], FULL)
    last_TV = step([Request(IDS[:20], dirty, 3)], FULL)
    assert last_TV.equal(all_TV[-3:])


@torch.inference_mode()
def test_members_share_what_is_packed_and_it_grows_when_a_larger_one_comes(
    tiny_config: ElasticConfig,
) -> None:
    model = make_model(tiny_config)
    step = make_step(model, torch.float32)
    small, sizes = Granularity.parse("ffn=0.5,layers=0-1"), []
    first_TV = step([Request(IDS, new_cache(model), 1)], small)
    for member in (small, Granularity.parse("ffn=0.25,layers=0"), FULL, small):
        step.prepare(member)
        sizes.append(step.num_bytes)
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    assert step([Request(IDS, new_cache(model), 1)], small).equal(first_TV)
    alone = make_step(model, torch.float32)
    alone.prepare(FULL)
    assert alone.num_bytes == sizes[2]


@torch.inference_mode()
def test_a_head_of_few_tokens_gives_those_tokens_logits(tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    step, ids = make_step(model, torch.float32), torch.tensor([3, 9, 40])
    few = nn.Linear(32, 3, bias=False)
    few.weight = nn.Parameter(model.lm_head.weight.detach()[ids])
    whole_TV = step([Request(IDS, new_cache(model), 4)], FULL)
    few_TN = step([Request(IDS, new_cache(model), 4)], FULL, Head(few))
    assert few_TN.equal(whole_TV[:, ids])


@torch.inference_mode()
def test_weights_may_be_in_another_dtype_than_the_store(tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    expected_TV = make_step(model, torch.float32)([Request(IDS, new_cache(model), 5)], FULL)
    half_TV = make_step(model, torch.bfloat16)([Request(IDS, new_cache(model), 5)], FULL)
    far = (half_TV - expected_TV).abs().max() / expected_TV.abs().max()
    assert 1e-4 < far < RTOL[torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "fields"), [(torch.float64, {}), (torch.float16, {}), (torch.float32, {"hidden_size": 31})]
)
def test_what_it_cannot_run_is_left_to_torch(
    dtype: torch.dtype, fields: dict[str, int], tiny_config: ElasticConfig
) -> None:
    assert make_decode_step(make_model(tiny_config, dtype, **fields), dtype) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigOfTheFuture(ElasticConfig):
    new_flag: bool = False


def test_a_configuration_that_it_does_not_know_is_left_to_torch(tiny_config: ElasticConfig) -> None:
    without, with_flag = (
        ConfigOfTheFuture(**vars(tiny_config), new_flag=new_flag) for new_flag in (False, True)
    )
    assert supports(tiny_config)
    assert supports(without)
    assert not supports(with_flag)
    model = make_model(with_flag)
    assert make_decode_step(model, torch.float32) is None
    assert not pack(model, "int8").can_draw
    assert pack(make_model(without), "int8").can_draw


def test_every_field_of_a_configuration_is_known_to_it() -> None:
    every = {field.name for field in dataclasses.fields(ElasticConfig)}
    assert every == COMPUTED | UNRELATED | LEFT_TO_TORCH


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("post_norms", True), ("norm_offset", True), ("scale_embeddings", True)),
        *(("hidden_act", "gelu_pytorch_tanh"), ("query_pre_attn_scalar", 5.0)),
    ],
)
def test_what_it_does_not_compute_is_left_to_torch(
    field: str, value: Any, tiny_config: ElasticConfig
) -> None:
    assert supports(tiny_config)
    assert field in LEFT_TO_TORCH
    assert not supports(dataclasses.replace(tiny_config, **{field: value}))


@torch.inference_mode()
@pytest.mark.parametrize("token", [-1, 64])
def test_what_is_no_token_is_refused(token: int, tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    with pytest.raises(IndexError, match=f"from 0 to 63, got .*{token}"):
        make_step(model, torch.float32)([Request([1, token], new_cache(model), 1)], FULL)


@torch.inference_mode()
def test_it_computes_with_the_weights_that_it_was_made_of(tiny_config: ElasticConfig) -> None:
    model = make_model(tiny_config)
    step = make_step(model, torch.float32)
    before_TV = step([Request(IDS, new_cache(model), 3)], FULL)
    model.to(torch.bfloat16)  # new storage for every weight
    cache = KVCache(model.config, num_positions=64)
    assert step([Request(IDS, cache, 3)], FULL).equal(before_TV)


SAMPLINGS = {
    "likeliest": {},
    "temperature": {"temperature": 0.7},
    "all but certain": {"temperature": 1e-3},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-k beyond the vocabulary": {"temperature": 1.0, "top_k": 2**32 + 1},
    "top-p": {"temperature": 1.3, "top_p": 0.6},
    "top-p that one token reaches": {"temperature": 1.0, "top_p": 1e-6},
    "min-p": {"temperature": 1.0, "min_p": 0.3},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.8, "min_p": 0.1},
}
ROW_ATOL = 1e-6


def heads(model: ElasticLM) -> list[Head]:
    """The model's, one of few tokens, and one that gives equal logits to many."""
    few = torch.tensor([40, 3, 9, 12, 50])
    equal = torch.arange(60).flip(0)
    weights = model.lm_head.weight.detach()
    found = [Head(model.lm_head)]
    for ids, weight in ((few, weights[few]), (equal, weights[equal % 4])):
        map_ = nn.Linear(32, len(ids), bias=False)
        map_.weight = nn.Parameter(weight)
        found.append(Head(map_, ids))
    return found


def choose(row_N: Tensor, draws: Draws, position: int, ids_N: Tensor) -> int:
    """What the pass is to choose from this row of logits, or distribution."""
    if not draws.temperature:
        return int(ids_N[row_N.argmax()])
    if draws.races_CV is not None:
        return int(ids_N[(row_N * draws.races_CV[position, ids_N]).argmax()])
    cumulative_N = row_N.double().cumsum(0)
    point = draws.uniforms[position] * cumulative_N[-1]
    return int(ids_N[torch.searchsorted(cumulative_N, point, right=True)])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("races", [False, True])
def test_a_pass_that_chooses_tokens_is_as_many_passes(
    fields: dict[str, float], races: bool, dtype: torch.dtype, tiny_config: ElasticConfig
) -> None:
    """Tokens are drawn from the rows, which are distributions, and all but the last are read."""
    model = make_model(tiny_config, stored_as(dtype))
    step, params = make_step(model, dtype), SamplingParams(**fields)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    for head in heads(model):
        ids_N = torch.arange(64) if head.ids_N is None else head.ids_N
        asked = []
        for length, num_last, count in ((9, 2, 5), (1, 1, 0), (20, 1, 4), (3, 1, 1)):
            draws = None
            if count:
                how: dict[str, Any] = {"uniforms": torch.rand(count, generator=rng).tolist()}
                if races:
                    how = {"races_CV": torch.rand(count, 64, generator=rng, dtype=torch.float64) + 0.1}
                draws = Draws(count=count, **fields, **how)  # type: ignore[arg-type]
            asked.append(Request(IDS[:length], new_cache(model), num_last, draws))
        rows = step(asked, FULL, head).split([one.num_rows for one in asked])
        for (tokens, ours, num_last, draws), rows_TN in zip(asked, rows, strict=True):
            theirs = new_cache(model)
            logits_TN = step([Request(tokens, theirs, num_last)], FULL, head)
            theirs.commit(len(tokens))
            for position in range(0 if draws is None else draws.count):
                assert draws is not None
                row_N = rows_TN[num_last - 1 + position]
                if params.is_greedy:
                    assert row_N.equal(logits_TN[-1])
                else:
                    probs_N = sampling_probs(logits_TN[-1:], params)[0]
                    torch.testing.assert_close(row_N, probs_N, rtol=1e-5, atol=ROW_ATOL)
                    if fields.keys() > {"temperature"}:  # what is left out is the same
                        assert ((row_N > 0) == (probs_N > 0)).all()
                assert draws.ids[position] == choose(row_N, draws, position, ids_N)
                if position + 1 < draws.count:
                    logits_TN = step([Request([draws.ids[position]], theirs, 1)], FULL, head)
                    theirs.commit(1)
            ours.commit(len(tokens) + (0 if draws is None else draws.num_read))
            assert kept(ours, 4).equal(kept(theirs, 4))


@torch.inference_mode()
def test_numbers_draw_each_token_as_often_as_its_distribution_says(tiny_config: ElasticConfig) -> None:
    """Evenly spaced numbers: a token's share is its probability to one in their number."""
    model = make_model(tiny_config)
    step, num = make_step(model, torch.float32), 4000
    counts_V, probs_V = torch.zeros(64), torch.empty(64)
    for number in range(num):
        draws = Draws(count=1, temperature=1.0, uniforms=[(number + 0.5) / num])
        probs_V = step([Request(IDS[:5], new_cache(model), 1, draws)], FULL)[0]
        counts_V[draws.ids[0]] += 1
    assert (counts_V / num - probs_V).abs().max() <= 1 / num + ROW_ATOL
    assert (counts_V > 0).sum() > 10
    draws = Draws(count=1, temperature=1.0, uniforms=[math.nextafter(1.0, 0.0)])
    step([Request(IDS[:5], new_cache(model), 1, draws)], FULL)
    assert probs_V[draws.ids[0]] > 0
