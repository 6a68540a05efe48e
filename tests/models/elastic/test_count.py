import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from models.base.errors import UsageError
from models.elastic.cache import KVCache
from models.elastic.config import ElasticConfig
from models.elastic.count import (
    count_flops,
    count_kv_bytes,
    count_parameters,
    count_weight_bytes,
    estimate_training_bytes,
)
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.kernels.build import library
from tests.models.checkpoint.test_gemma3 import GEMMA3

MEMBERS = [
    "full",
    "S",
    "heads=0.5",
    "layers=0-1",
    "layers=0:3",
    "ffn=0.25,heads=0.5,layers=1:3",
    "ffn=1:0.5:0.25:0.125",
    "ffn=0.5:0.3,heads=1:0.5,layers=0:2",
]
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True},
    "qk-norm": {"qk_norm": True},
    "gemma3_text": GEMMA3,
    "gemma3_text, no window": {**GEMMA3, "layer_types": None},
    "one head per group": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 24},
}
KEPT_SHARE = 0.03
"""How far the estimate of what autograd keeps may be off: a number or two per head and norm is left out."""


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, tiny_config: ElasticConfig) -> ElasticLM:
    torch.manual_seed(0)
    return ElasticLM(dataclasses.replace(tiny_config, **VARIANTS[request.param])).eval()


def count_numbers(state: dict[str, Tensor]) -> int:
    """Numbers of a state dict, a tensor under two names once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in state.values()}.values())


@pytest.mark.parametrize("text", MEMBERS)
def test_parameters_are_those_of_the_members_weights(model: ElasticLM, text: str) -> None:
    granularity = Granularity.parse(text)
    real = count_numbers(View(model, granularity).state_dict())
    assert count_parameters(model.config, granularity) == real
    assert count_weight_bytes(model.config, granularity, dtype_bytes=2) == 2 * real


def test_parameters_of_the_full_model_are_those_of_the_module(model: ElasticLM) -> None:
    assert count_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


def real_flops(
    model: ElasticLM, granularity: Granularity, num_tokens: int, num_cached: int, num_last: int
) -> int:
    """What torch counts. Its counter knows no fused CPU attention, so attention runs as plain products."""
    cache = KVCache(model.config, num_positions=num_cached + num_tokens)
    cache.commit(num_cached)
    tokens_BT = torch.zeros(1, num_tokens, dtype=torch.int64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens_BT, granularity, cache, num_last=num_last)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("text", MEMBERS)
@pytest.mark.parametrize(("num_tokens", "num_cached"), [(9, 0), (1, 12), (4, 12)])
def test_flops_are_those_that_torch_counts(
    model: ElasticLM, text: str, num_tokens: int, num_cached: int
) -> None:
    granularity = Granularity.parse(text)
    ours = count_flops(model.config, granularity, num_tokens=num_tokens, num_cached=num_cached)
    assert ours == real_flops(model, granularity, num_tokens, num_cached, num_last=num_tokens)


def test_flops_of_a_prefill_score_one_position(model: ElasticLM) -> None:
    ours = count_flops(model.config, num_tokens=9, num_scored=1)
    assert ours == real_flops(model, FULL, num_tokens=9, num_cached=0, num_last=1)


def test_a_pass_over_pieces_costs_the_whole_pass_but_for_masked_scores(tiny_config: ElasticConfig) -> None:
    whole = count_flops(tiny_config, num_tokens=12)
    pieces = [count_flops(tiny_config, num_cached=position) for position in range(12)]
    masked_scores = 12 * 11 // 2
    wasted = 4 * masked_scores * tiny_config.num_attention_heads * tiny_config.head_dim
    assert whole - sum(pieces) == wasted * tiny_config.num_hidden_layers


def test_kv_bytes_are_those_of_the_cache(model: ElasticLM) -> None:
    cache = KVCache(model.config, num_positions=7, dtype=torch.bfloat16)
    assert count_kv_bytes(model.config, num_positions=7, dtype_bytes=2) == cache.num_bytes


def test_kv_bytes_of_a_member_are_those_of_its_groups(tiny_config: ElasticConfig) -> None:
    member = Granularity.parse("heads=0.5:1,layers=0:2")
    whole = count_kv_bytes(tiny_config, num_positions=8, dtype_bytes=4)
    assert count_kv_bytes(tiny_config, member, num_positions=8, dtype_bytes=4) * 8 == whole * 3


@given(
    ffn=st.sampled_from([0.125, 0.25, 0.5]), num_layers=st.integers(1, 3), heads=st.sampled_from([0.5, 1.0])
)
def test_a_smaller_member_costs_less(ffn: float, num_layers: int, heads: float) -> None:
    config = ElasticConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    small = Granularity(ffn=(ffn,), heads=(heads,), layers=tuple(range(num_layers)))
    large = Granularity(ffn=(2 * ffn,), layers=tuple(range(num_layers + 1)))
    assert count_parameters(config, small) < count_parameters(config, large)
    assert count_flops(config, small, num_cached=5) < count_flops(config, large, num_cached=5)


def test_a_granularity_that_does_not_fit_is_refused(tiny_config: ElasticConfig) -> None:
    with pytest.raises(UsageError, match="layers"):
        count_parameters(tiny_config, Granularity.parse("layers=9"))


def kept_by_autograd(model: ElasticLM, granularities: Iterable[Granularity], tokens_BT: Tensor) -> int:
    """Bytes of the distinct tensors that a step's graph keeps, the weights and tables aside."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and storage not in owned:
            kept[storage] = tensor  # holding it keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for granularity in granularities:
            logits_NV = model(tokens_BT, granularity).flatten(0, 1)
            cross_entropy(logits_NV, tokens_BT.flatten())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_the_estimate_is_near_what_autograd_keeps(model: ElasticLM) -> None:
    tokens_BT = torch.zeros(2, 64, dtype=torch.int64)
    member = Granularity.parse("ffn=0.25,heads=0.5,layers=0:2")
    if library("train_ops") is None:
        pytest.skip("needs a C compiler")
    if model.config.layer_types is not None:
        pytest.skip("blocks of a window keep copies of keys, which are not counted")
    ours = estimate_training_bytes(model.config, batch_tokens=128, members=[(member, 1.0)], compiled=True)
    # Autograd keeps the log-softmax; the logits and the gradient live besides, for a moment.
    log_softmax = 2 * 128 * model.config.vocab_size * 4
    assert ours.logits == 3 * log_softmax
    real = kept_by_autograd(model, [FULL, member], tokens_BT)
    joined = ours.weights - count_weight_bytes(model.config, dtype_bytes=4)
    assert ours.activations + joined + log_softmax == pytest.approx(real, rel=KEPT_SHARE)


def test_the_estimate_counts_each_tensor_of_adamw(model: ElasticLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    ours = estimate_training_bytes(model.config, batch_tokens=1)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert ours.optimizer == sum(moment.nbytes for moment in moments)
    assert ours.weights == ours.gradients == sum(parameter.nbytes for parameter in model.parameters())
    assert ours.total == sum(dataclasses.asdict(ours).values())


def test_an_exit_costs_a_head_only(tiny_config: ElasticConfig) -> None:
    alone = estimate_training_bytes(tiny_config, batch_tokens=10)
    prefix = [(Granularity.parse("layers=0-1"), 1.0)]
    joint = estimate_training_bytes(tiny_config, batch_tokens=10, members=prefix)
    assert joint == dataclasses.replace(alone, logits=2 * alone.logits)
