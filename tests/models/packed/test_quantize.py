"""Packed precisions: what they compute, what they share, and that tokens do not depend on companions."""

import pytest
import torch
from torch import nn

from models.base.errors import UsageError
from models.checkpoint.weights import weights_of
from models.elastic.cache import KVCache
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import View
from models.kernels.blocks import in_4_bits
from models.kernels.codes import quantize
from models.packed import decode_step
from models.packed.quantize import QuantizedLinear, pack, packed_bytes, prepare, split_precision

TOKENS = torch.arange(24).view(2, 12)
MEMBERS = ("full", "ffn=0.25", "ffn=0.5,heads=0.5,layers=0:3", "layers=0-1")
# Relative to the size of the logits of a random model; weights and activations have 8 (bf16: 9) bits,
# int4's weights 4.
RTOL = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.06, "int4": 0.5, "q4_0": 0.5}


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with either."""
    if request.param == "torch":
        monkeypatch.setattr(decode_step, "library", lambda: None)


@torch.inference_mode()
def logits(model: ElasticLM, text: str = "full") -> torch.Tensor:
    return View(model, Granularity.parse(text))(TOKENS)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("precision", RTOL)
@pytest.mark.parametrize("text", MEMBERS)
def test_every_member_runs_in_every_precision_about_as_it_is(
    text: str, precision: str, tiny_model: ElasticLM
) -> None:
    packed = pack(tiny_model, precision, Granularity.parse(text))
    far = distance(logits(packed, text), logits(tiny_model, text))
    assert far < RTOL[precision]
    assert far > 1e-3 or precision == "fp32"  # it really runs in fewer bits


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "q4_0"])
def test_biases_and_head_norms_are_kept(precision: str, tiny_config: ElasticConfig) -> None:
    fields = {name: getattr(tiny_config, name) for name in tiny_config.__dataclass_fields__}
    model = ElasticLM(ElasticConfig(**(fields | {"attention_bias": True, "qk_norm": True})))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    assert distance(logits(pack(model, precision)), logits(model)) < RTOL[precision]


@torch.inference_mode()
def test_an_int8_tokens_products_do_not_depend_on_its_companions() -> None:
    linear = QuantizedLinear(nn.Linear(64, 48), "int8")
    x_TD = torch.randn(9, 64)
    x_TD[3] *= 1000  # one range for all rows would leave the others no bits
    all_TO = linear(x_TD)
    for t in range(9):
        torch.testing.assert_close(linear(x_TD[t : t + 1])[0], all_TO[t], rtol=0, atol=0)


@torch.inference_mode()
def test_an_int8_targets_logits_do_not_depend_on_what_is_scored_beside_them(tiny_model: ElasticLM) -> None:
    target = pack(tiny_model, "int8")
    for name, parameter in target.named_parameters():
        if "embed" in name:
            parameter[63] *= 1000  # a companion of another size
    alone = target(TOKENS[:1])[0]
    for companion in (5, 63):
        rows = torch.stack([TOKENS[0], torch.full((12,), companion)])
        torch.testing.assert_close(target(rows)[0], alone, rtol=1e-4, atol=1e-4)
        after = torch.cat([TOKENS[0], torch.full((4,), companion)])
        torch.testing.assert_close(target(after[None])[0, :12], alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_an_int8_target_keeps_keys_and_values_in_bf16_and_decodes_as_it_scores(tiny_model: ElasticLM) -> None:
    target = pack(tiny_model, "int8")
    cache = target.new_cache(12)
    assert cache.dtype == torch.bfloat16
    assert pack(tiny_model, "fp32").new_cache(12).dtype == torch.float32
    decoded = target.run([Request([0, 1, 2, 3, 4], cache, 5)])
    cache.commit(5)
    decoded = torch.cat([decoded, target.run([Request([5, 6, 7, 8, 9, 10, 11], cache, 7)])])
    assert distance(decoded, logits(target)[0]) < RTOL["int8"]
    assert distance(decoded, logits(tiny_model)[0]) < RTOL["int8"]


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "q4_0"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_packed_member_reads_and_writes_a_store_of_the_targets_dtype(
    dtype: torch.dtype, precision: str, tiny_model: ElasticLM
) -> None:
    target = tiny_model.to(dtype)
    cache = KVCache(target.config, num_positions=16, dtype=dtype)
    target(TOKENS[:1, :8], memory=cache)
    cache.commit(8)
    theirs = View(target, Granularity.parse("S")).run([Request([8], cache.view(), 1)])
    member = View(pack(target, precision), Granularity.parse("S"))
    ours = member.run([Request([8], cache.view(), 1)])
    assert distance(ours.double(), theirs.double()) < RTOL[precision]
    assert ours.dtype in {dtype, torch.promote_types(dtype, torch.float32)}


def test_a_packed_copy_shares_the_sources_tensors_and_leaves_it_as_it_was(tiny_model: ElasticLM) -> None:
    before = logits(tiny_model)
    packed = pack(tiny_model, "int8")
    torch.testing.assert_close(logits(tiny_model), before, rtol=0, atol=0)
    ours, theirs = weights_of(packed), weights_of(tiny_model)
    assert list(ours) == list(theirs)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    assert packed.model.embed_tokens.weight is tiny_model.model.embed_tokens.weight


def test_only_the_asked_member_is_packed_and_its_bytes_are_told(tiny_model: ElasticLM) -> None:
    packed = pack(tiny_model, "int8", Granularity.parse("ffn=0.25,layers=0"))
    # Where decoding is compiled a head of 8, and the 16 neurons, take panels of 32.
    heads, ffn = (8 * 8, 16) if packed.decode_step is None else (8 * 32, 32)
    attention, mlp = heads * (32 + 4) + 32 * (32 + 4), 2 * ffn * (32 + 4) + 32 * (16 + 4)
    assert packed_bytes(packed) == attention + mlp + 64 * (32 + 4)
    assert packed_bytes(tiny_model) == 0
    assert prepare(packed, Granularity.parse("ffn=0.25,layers=0")) == 0  # nothing is packed twice


def test_4_bits_take_half_of_8_where_decoding_is_compiled(tiny_model: ElasticLM) -> None:
    eight, four = pack(tiny_model, "int8"), pack(tiny_model, "int4")
    if four.decode_step is None:
        pytest.skip("torch's kernels compute with the rounded weights in fp32")
    heads = 8 * 32  # each of 8 takes a panel of 32
    weights = 4 * (heads * 32 + 32 * 32 + 3 * 64 * 32) + 64 * 32
    assert packed_bytes(eight) - packed_bytes(four) == weights // 2


def test_blocks_of_4_bits_take_a_scale_for_32_weights_and_round_less(tiny_model: ElasticLM) -> None:
    blocks = pack(tiny_model, "q4_0")
    if blocks.decode_step is None:
        pytest.skip("torch's kernels compute with the rounded weights in fp32")
    heads = 8 * 32  # each of 8 takes a panel of 32
    assert packed_bytes(blocks) == 4 * (heads * 32 + 32 * 32 + 3 * 64 * 32) // 32 * 18 + 64 * 34
    weight_OI = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight_OI[:, 5] *= 20  # one input's weights span the scale of a whole row
    codes_OI, scales_O1 = quantize(weight_OI, 4)
    assert distance(in_4_bits(weight_OI).dequantize(), weight_OI) < distance(codes_OI * scales_O1, weight_OI)


def test_all_members_of_a_dtype_share_what_is_packed(tiny_model: ElasticLM) -> None:
    packed = pack(tiny_model, "bf16")
    heads, rest = 4 + 2 * 2, 2 * (4 * (32 * 32 + 3 * 64 * 32) + 64 * 32)
    # Where decoding is compiled a head of 8 takes a panel of 32.
    width = 8 if packed.decode_step is None else 32
    assert packed_bytes(packed) == rest + 2 * 4 * heads * width * 32
    if packed.decode_step is not None:
        assert prepare(packed, Granularity.parse("ffn=0.25,heads=0.5,layers=0")) == 0


def test_a_packed_copy_is_packed_again_from_the_weights(tiny_model: ElasticLM) -> None:
    twice = pack(pack(tiny_model, "int8"), "fp32", FULL)
    torch.testing.assert_close(logits(twice), logits(tiny_model), rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_finite() -> None:
    linear = QuantizedLinear(nn.Linear(8, 4, bias=False), "int8")
    with torch.inference_mode():
        assert linear(torch.zeros(2, 8)).tolist() == [[0.0] * 4] * 2


def test_a_precision_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"S@int3: 'int3' is not a precision; choose from fp32, bf16"):
        split_precision("S@int3")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "int4", "q4_0"])
def test_codes_on_a_gpu_are_refused(precision: str, tiny_model: ElasticLM) -> None:
    with pytest.raises(UsageError, match=f"{precision} runs on a CPU"):
        pack(tiny_model.to("cuda"), precision)
