"""Attention as blocks of products gives torch's own result and gradients, whatever the mask and the sizes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import blockwise
from models.attention import attend
from models.blockwise import blockwise_attention
from models.cache import Reading, Recording, SharedPrefix, block_starts

CAUSAL = "causal"
MASKS = [CAUSAL, "shared", "window", "all"]


def make_mask(kind: str, num_positions: int) -> Tensor | None:
    """Which of S keys each position reads; None is causal."""
    places = torch.arange(num_positions)
    apart = places[:, None] - places
    if kind == "shared":
        return SharedPrefix(Recording(), block_starts(num_positions, 5, 2)).mask_TS
    if kind == "window":
        return (apart >= 0) & (apart < 7)
    if kind == "all":
        return torch.ones(num_positions, 3, dtype=torch.bool)
    return None


def make_tensors(
    mask_TS: Tensor | None, num_positions: int, groups: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    num_keys = num_positions if mask_TS is None else mask_TS.shape[1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, num_positions, 8), (3, groups, num_keys, 8), (3, groups, num_keys, 8)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def plain(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_TS: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_TS, is_causal=mask_TS is None, enable_gqa=True
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("num_positions", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("piece_bytes", [1, 40_000, 2**21])
def test_values_and_gradients_are_torchs(
    monkeypatch: pytest.MonkeyPatch, kind: str, num_positions: int, groups: int, piece_bytes: int
) -> None:
    """In fp64, where no wrong term can hide: blocks of 16, whole and not, rows one by one and together."""
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(blockwise, "PIECE_BYTES", piece_bytes)
    blockwise._causal_blocks.cache_clear()
    mask_TS = make_mask(kind, num_positions)
    tensors = make_tensors(mask_TS, num_positions, groups)
    ours, theirs = (attention(*tensors, mask_TS) for attention in (blockwise_attention, plain))
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad)
    )
    blockwise._causal_blocks.cache_clear()


@pytest.mark.parametrize("kind", [CAUSAL, "shared"])
def test_bf16_is_as_exact_as_bf16_products(kind: str) -> None:
    """Scores are rounded to bf16 once more than in a fused kernel, and no more than that."""
    mask_TS = make_mask(kind, 130)
    wide = make_tensors(mask_TS, 130, 2)
    q, k, v = narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    expected, found = plain(*wide, mask_TS), blockwise_attention(q, k, v, mask_TS)
    assert found.dtype == torch.bfloat16
    grad = torch.randn_like(expected)
    pairs = zip(
        (expected, *torch.autograd.grad(expected, wide, grad)),
        (found, *torch.autograd.grad(found, narrow, grad.bfloat16())),
        strict=True,
    )
    for right, ours in pairs:
        assert (ours.double() - right).norm() < 0.01 * right.norm()


def test_autocast_decides_the_dtype() -> None:
    tensors = make_tensors(None, 20, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = blockwise_attention(*tensors, None)
    assert mixed.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(mixed.float().sum(), tensors))


def test_rows_do_not_depend_on_their_companions() -> None:
    tensors = make_tensors(None, 100, 2, torch.float32)
    together = blockwise_attention(*tensors, None)
    q, k, v = (x[1:2] for x in tensors)
    alone = blockwise_attention(q, k, v, None)
    torch.testing.assert_close(together[1:2], alone)


def test_a_pass_that_is_not_trained_and_one_with_a_cache_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.attention.blockwise_attention", lambda *_: pytest.fail("it was called"))
    q_BHTK, k_BGTK, v_BGTK = make_tensors(None, 20, 2, torch.float32)
    with torch.no_grad():
        attend(q_BHTK, Reading(k_BGTK, v_BGTK, None))
    last_BH1K = q_BHTK[:, :, -1:]  # reads everything: no mask, and fewer queries than keys
    expected = plain(q_BHTK, k_BGTK, v_BGTK, None)[:, :, -1:]
    torch.testing.assert_close(attend(last_BH1K, Reading(k_BGTK, v_BGTK, None)), expected)
