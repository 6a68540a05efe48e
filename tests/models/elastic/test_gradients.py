"""What a trained pass gives is the same whether what lies between its products is compiled or torch's."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from models.elastic.cache import Recording, SharedPrefix, block_starts
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.kernels.build import library

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases and head norms": {"attention_bias": True, "qk_norm": True},
    "one group": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 40, "intermediate_size": 83},
    "layers without positions": {"no_rope_layers": (0, 1, 1, 0)},
}
TOLERANCE = {"fp32": 1e-5, "bf16": 0.2, "autocast": 0.2}
"""Of the norm; tiny_config's large weights make a rounding in the first layer a few percent at the end."""


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if library("train_ops") is None:
        pytest.skip("needs a C compiler")


def gradients(model: ElasticLM, member: Granularity, *, shared: bool = False) -> dict[str, Tensor]:
    """Of a loss of all logits; with `shared`, of a member that reads the full pass's cache."""
    tokens_BT = torch.arange(2 * 37).reshape(2, 37) * 7 % model.config.vocab_size
    memory = None
    if shared:
        recording = Recording()
        model.states(tokens_BT, FULL, recording)
        memory = SharedPrefix(recording.rows(slice(0, 2)), block_starts(37, 8, 3))
    logits_BTV = model(tokens_BT, member, memory)
    weights_BTV = torch.linspace(-1, 1, logits_BTV.numel(), dtype=torch.float64).sin().view_as(logits_BTV)
    (logits_BTV * weights_BTV).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("text", ["full", "ffn=0.25,heads=0.5,layers=0:2", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_fp64(
    shape: str, text: str, precision: str, tiny_config: ElasticConfig
) -> None:
    if shape == "one group" and "heads" in text:
        pytest.skip("half of one group is one group")
    model = ElasticLM(dataclasses.replace(tiny_config, **SHAPES[shape]))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model = model.bfloat16() if precision == "bf16" else model
    exact = copy.deepcopy(model).double()
    shared = text == "shared"
    member = Granularity.parse("layers=0-1,ffn=0.5" if shared else text)
    expected = gradients(exact, member, shared=shared)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = gradients(model, member, shared=shared)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert (found[name] - right).norm() < TOLERANCE[precision] * right.norm().clamp_min(1e-3), name
