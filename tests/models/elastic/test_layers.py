"""Parts of a block whose backward pass is written out: it is the one that autograd would find."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from models.elastic.config import ElasticConfig
from models.elastic.layers import FIRST_POSITIONS, Rotary
from models.elastic.norm import RMSNorm
from models.kernels.build import library


@pytest.fixture
def norm(tiny_config: ElasticConfig) -> RMSNorm:
    norm = RMSNorm(12, tiny_config)
    torch.nn.init.normal_(norm.weight)
    return norm


def test_a_norm_trains_like_torchs(norm: RMSNorm) -> None:
    norm = norm.double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = norm(x), F.rms_norm(x, (12,), norm.weight, norm.eps)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(x)
    inputs = (x, norm.weight)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_under_autocast_gives_what_a_product_reads(norm: RMSNorm, dtype: torch.dtype) -> None:
    """One cast instead of one for each product, and the same numbers."""
    if dtype == torch.float32 and library("train_ops") is None:
        pytest.skip("needs a C compiler")
    x = torch.randn(2, 5, 12).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    expected = F.rms_norm(x.detach().float(), (12,), norm.weight, norm.eps).bfloat16()
    torch.testing.assert_close(y, expected, rtol=0.008, atol=0)  # a last place of bf16
    grads = torch.autograd.grad(y.float().sum(), (x, norm.weight))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]


def test_a_norm_of_zeros_has_finite_gradients(norm: RMSNorm) -> None:
    x = torch.zeros(1, 12, requires_grad=True)
    (grad,) = torch.autograd.grad(norm(x).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("inference", [True, False])
def test_a_rotary_table_grows_with_the_text_and_keeps_its_numbers(
    inference: bool, tiny_config: ElasticConfig
) -> None:
    config = dataclasses.replace(tiny_config, max_position_embeddings=5000)
    rotary, whole = Rotary(config), Rotary(config)
    whole.reach(5000)
    assert len(whole.cos_TK) == 5000
    assert len(rotary.cos_TK) == FIRST_POSITIONS
    with torch.inference_mode(inference):
        for positions in (slice(3, 7), slice(1020, 1030), torch.tensor([4, 4999])):
            for ours, theirs in zip(
                rotary(positions, torch.float32), whole(positions, torch.float32), strict=True
            ):
                assert ours.equal(theirs)
    assert not rotary.cos_TK.is_inference()
    rotary.reach(9000)
    assert len(rotary.cos_TK) == 5000
