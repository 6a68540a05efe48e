"""Each compiled part of a training step is torch's, forward and backward, in fp32 and bf16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.elastic.cache import Recording, SharedPrefix, block_starts
from models.elastic.config import ElasticConfig
from models.elastic.layers import Rotary
from models.elastic.ops import rotate
from models.kernels.train_losses import cosine_distance, cross_entropy, forward_kl, overlap
from models.kernels.train_merge import Prefix, merge
from models.kernels.train_ops import attention, rms_norm, rope, swiglu

pytestmark = pytest.mark.usefixtures("compiled")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of an error's norm in that of the result. What lies between is in fp32: bf16 rounds results, not sums."""
CAUSAL = "causal"
MASKS = [CAUSAL, "shared", "window", "some"]


def make(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def with_gradients(function: Callable[..., Any], *arguments: Tensor) -> list[Tensor]:
    """Results and gradients, for gradients of the results that are drawn alike each time."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    results = function(*leaves)
    results = list(results) if isinstance(results, tuple) else [results]
    grads = [make(*y.shape, dtype=torch.float32, seed=9).detach().to(y.dtype) for y in results]
    torch.autograd.backward(results, grads)
    return [*(y.detach() for y in results), *(x.grad for x in leaves if x.grad is not None)]


def check_against(
    expected: Callable[..., Any], function: Callable[..., Any], *arguments: Tensor, dtype: torch.dtype
) -> None:
    """The function in `dtype` against the other one on the same numbers in fp64."""
    ours = with_gradients(function, *arguments)
    exact = with_gradients(expected, *(x.double() for x in arguments))
    assert len(ours) == len(exact)
    for number, (own, other) in enumerate(zip(ours, exact, strict=True)):
        error = (own.double() - other).norm() / other.norm().clamp_min(1.0)
        assert error < TOLERANCE[dtype], (number, error)


def make_mask(kind: str, num_positions: int) -> Tensor | None:
    """Which of S keys each position reads; None is causal."""
    places = torch.arange(num_positions)
    apart = places[:, None] - places
    if kind == "shared":
        return SharedPrefix(Recording(), block_starts(num_positions, 5, 2)).mask_TS
    if kind == "window":
        return (apart >= 0) & (apart < 7)
    if kind == "some":
        mask_TS = torch.rand(num_positions, 70, generator=torch.Generator().manual_seed(1)) < 0.1
        mask_TS[:, 69] = True
        return mask_TS
    return None


def plain_attention(mask_TS: Tensor | None) -> Callable[..., Tensor]:
    def attend(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_TS, is_causal=mask_TS is None, enable_gqa=True
        )

    return attend


def make_heads(
    mask_TS: Tensor | None, num_positions: int, groups: int, size: int, dtype: torch.dtype
) -> list[Tensor]:
    num_keys = num_positions if mask_TS is None else mask_TS.shape[1]
    shapes = [(3, 4, num_positions, size), (3, groups, num_keys, size), (3, groups, num_keys, size)]
    return [make(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("groups", "size"), [(1, 16), (2, 8), (4, 40), (2, 64)])
@pytest.mark.parametrize("num_positions", [1, 15, 32, 33, 100])
@pytest.mark.parametrize("kind", MASKS)
def test_attention(kind: str, num_positions: int, groups: int, size: int, dtype: torch.dtype) -> None:
    mask_TS = make_mask(kind, num_positions)
    tensors = make_heads(mask_TS, num_positions, groups, size, dtype)
    check_against(
        plain_attention(mask_TS), lambda q, k, v: attention(q, k, v, mask_TS), *tensors, dtype=dtype
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_positions", [7, 64, 100])
def test_attention_to_recorded_keys_is_that_to_all_keys(num_positions: int, dtype: torch.dtype) -> None:
    """In one array or in two; the recorded keys and values, which learn nothing, get no gradients."""
    mask_TS = make_mask("shared", num_positions)
    q, k, v = make_heads(mask_TS, num_positions, 2, 16, dtype)
    first_k, own_k, first_v, own_v = (
        part.detach().requires_grad_() for x in (k, v) for part in x.split(num_positions, dim=2)
    )

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, torch.cat([first_k.detach(), k], 2), torch.cat([first_v.detach(), v], 2), mask_TS)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask_TS, (first_k, first_v))

    pairs = zip(with_gradients(apart, q, own_k, own_v), with_gradients(whole, q, own_k, own_v), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)
    assert first_k.grad is None


def test_attention_to_large_scores_is_exact() -> None:
    """Scores of several hundreds: nothing overflows, and what is far below the largest is 0."""
    tensors = [make(2, 2, 70, 32, dtype=torch.float32, seed=seed, scale=6.0) for seed in range(3)]
    check_against(
        plain_attention(None), lambda q, k, v: attention(q, k, v, None), *tensors, dtype=torch.float32
    )


def test_heads_are_read_where_they_lie() -> None:
    """Queries, keys and values side by side in memory, and values of a head that are not."""
    qkv_BTNK = make(2, 40, 8, 16, dtype=torch.float32).detach()
    q, k, v = (part.transpose(1, 2) for part in qkv_BTNK.split((4, 2, 2), dim=2))
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), None)
    assert torch.equal(attention(q, k, v, None), expected)
    assert torch.equal(attention(q, k.mT.contiguous().mT, v, None), expected)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 48), (5, 77), (300, 256)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Its gradient and that of x as it is, for whoever reads x, too."""
    size = shape[-1]

    def expected(x: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        return F.rms_norm(x, (size,), weight_D, 1e-5), 1.0 * x

    def ours(x: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight_D, 1e-5, dtype)

    check_against(expected, ours, make(*shape, dtype=dtype), make(size, dtype=dtype, seed=1), dtype=dtype)


def test_a_norm_in_another_precision_than_its_input() -> None:
    """As under autocast: states in fp32, and what the products read in bf16."""
    x, weight_D = make(4, 64, dtype=torch.float32), make(64, dtype=torch.float32, seed=1)
    y, _ = rms_norm(x, weight_D, 1e-5, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rms_norm(x, weight_D, 1e-5, torch.float32)[0].bfloat16())
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("only", [0, 1])
def test_a_norm_of_which_one_result_is_used(only: int) -> None:
    x, weight_D = make(4, 32, dtype=torch.float32), make(32, dtype=torch.float32, seed=1)
    rms_norm(x, weight_D, 1e-5, torch.float32)[only].sum().backward()
    expected = make(4, 32, dtype=torch.float32)
    (F.rms_norm(expected, (32,), weight_D.detach(), 1e-5), expected)[only].sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (3, 1, 10), (2, 2, 64)])
def test_rope(heads: int, groups: int, size: int, dtype: torch.dtype, tiny_config: ElasticConfig) -> None:
    config = ElasticConfig(**{**vars(tiny_config), "head_dim": size})
    table = Rotary(config)(slice(21), torch.float32)

    def expected(qkv_BTNK: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv_BTNK.split((heads, groups, groups), dim=2)
        rotary = [part.double() for part in table]
        return tuple(x.transpose(1, 2) for x in (rotate(q, *rotary), rotate(k, *rotary), v))

    def ours(qkv_BTNK: Tensor) -> tuple[Tensor, ...]:
        return rope(qkv_BTNK, heads, groups, *(part.squeeze(1) for part in table))

    qkv_BTNK = make(2, 21, heads + 2 * groups, size, dtype=dtype)
    check_against(expected, ours, qkv_BTNK, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1,), (3, 31), (4, 64), (7, 33, 5)])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_swiglu(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    gate, up = make(*shape, dtype=dtype, scale=scale), make(*shape, dtype=dtype, seed=1)
    check_against(lambda gate, up: F.silu(gate) * up, swiglu, gate, up, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (5, 33), (40, 512)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_cross_entropy(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    """Labels below 0 count for nothing; the loss is in fp32 whatever the logits are in."""
    labels_N = torch.arange(shape[0]) % shape[1]
    labels_N[1::3] = -100

    def expected(logits_NV: Tensor) -> Tensor:
        return F.cross_entropy(logits_NV, labels_N, reduction="none")

    def ours(logits_NV: Tensor) -> Tensor:
        return cross_entropy(logits_NV, labels_N)

    check_against(expected, ours, make(*shape, dtype=dtype, scale=scale), dtype=dtype)
    assert cross_entropy(make(*shape, dtype=dtype), labels_N).dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target_dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (5, 33), (40, 512)])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (3.0, 0.5), (50.0, 2.0)])
def test_overlap(
    shape: tuple[int, int], scale: float, temperature: float, target_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Sum of min(p, q) and its gradient, which goes to the draft alone."""
    target_NV = make(*shape, dtype=target_dtype, scale=scale, seed=1)

    def expected(draft_NV: Tensor) -> Tensor:
        p_NV, q_NV = ((x.double() / temperature).softmax(-1) for x in (target_NV.detach(), draft_NV))
        return torch.minimum(p_NV, q_NV).sum(-1)

    def ours(draft_NV: Tensor) -> Tensor:
        return overlap(target_NV, draft_NV, temperature)

    check_against(expected, ours, make(*shape, dtype=dtype, scale=scale), dtype=dtype)
    assert target_NV.grad is None
    assert ours(make(*shape, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target_dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 2), (5, 33), (40, 512)])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (3.0, 0.5), (10.0, 2.0)])
def test_forward_kl(
    shape: tuple[int, int], scale: float, temperature: float, target_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """KL(p, q) and its gradient, which goes to the draft alone."""
    target_NV = make(*shape, dtype=target_dtype, scale=scale, seed=1)

    def expected(draft_NV: Tensor) -> Tensor:
        log_p_NV, log_q_NV = (
            (x.double() / temperature).log_softmax(-1) for x in (target_NV.detach(), draft_NV)
        )
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)

    def ours(draft_NV: Tensor) -> Tensor:
        return forward_kl(target_NV, draft_NV, temperature)

    check_against(expected, ours, make(*shape, dtype=dtype, scale=scale), dtype=dtype)
    assert target_NV.grad is None
    assert ours(make(*shape, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kl_of_equal_distributions_is_0_and_that_of_disjoint_ones_finite(dtype: torch.dtype) -> None:
    x_NV = make(40, 77, dtype=dtype, scale=5.0)
    assert torch.equal(forward_kl(x_NV, x_NV, 0.7), torch.zeros(40))
    some = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=dtype).requires_grad_()
    other = torch.tensor([[-torch.inf, 0.0, -torch.inf]], dtype=dtype)
    assert forward_kl(some, some, 1.0).item() == 0
    value = forward_kl(other, some, 1.0)
    value.backward()
    assert 87 < value.item() < 88
    torch.testing.assert_close(some.grad, torch.zeros_like(some))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equal_distributions_overlap_entirely(dtype: torch.dtype) -> None:
    """Whatever is rounded; and where a distribution is 0 in places, and where they share nothing."""
    x_NV = make(40, 77, dtype=dtype, scale=5.0)
    assert torch.equal(overlap(x_NV, x_NV, 0.7), torch.ones(40))
    some = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=dtype).requires_grad_()
    other = torch.tensor([[-torch.inf, 0.0, -torch.inf]], dtype=dtype)
    assert overlap(some, some, 1.0).item() == 1
    value = overlap(other, some, 1.0)
    value.backward()
    assert value.item() == 0
    torch.testing.assert_close(some.grad, torch.zeros_like(some))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target_dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(40, 64), (9, 77), (1, 3)])
def test_cosine_distance(shape: tuple[int, int], target_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """And its gradient, which goes to the states alone."""
    target_ND = make(*shape, dtype=target_dtype, scale=5.0, seed=1)

    def expected(states_ND: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(states_ND, target_ND.detach().double(), dim=-1)

    def ours(states_ND: Tensor) -> Tensor:
        return cosine_distance(target_ND, states_ND)

    check_against(expected, ours, make(*shape, dtype=dtype), dtype=dtype)
    assert target_ND.grad is None
    assert ours(make(*shape, dtype=dtype)).dtype == torch.float32


def test_states_of_zeros_have_a_finite_gradient() -> None:
    zeros_ND = torch.zeros(2, 4, requires_grad=True)
    cosine_distance(torch.ones(2, 4), zeros_ND).sum().backward()
    assert zeros_ND.grad is not None
    assert zeros_ND.grad.isfinite().all()


FUNCTIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "attention": (lambda q, k, v: attention(q, k, v, None), [(3, 4, 70, 16), (3, 2, 70, 16), (3, 2, 70, 16)]),
    "norm": (lambda x, w: rms_norm(x, w, 1e-5, torch.float32)[0], [(70, 48), (48,)]),
    "swiglu": (swiglu, [(70, 48), (70, 48)]),
    "cross-entropy": (lambda x: cross_entropy(x, torch.arange(70) % 48), [(70, 48)]),
    "overlap": (lambda q: overlap(make(70, 48, dtype=torch.float32, seed=3), q, 1.0), [(70, 48)]),
    "forward_kl": (lambda q: forward_kl(make(70, 48, dtype=torch.float32, seed=3), q, 1.0), [(70, 48)]),
    "cosine": (lambda x: cosine_distance(make(70, 48, dtype=torch.float32, seed=3), x), [(70, 48)]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_number_of_threads_gives_the_same_bits(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    tensors = [make(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(function, *tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_not_finite_is_not_hidden(name: str, value: float) -> None:
    """Or a step with a broken loss would not be skipped."""
    function, shapes = FUNCTIONS[name]
    tensors = [make(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        tensors[0].view(-1)[5] = value
    result, *grads = with_gradients(function, *tensors)
    assert not result.isfinite().all()
    assert not grads[0].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("whole", "prefix", "rank"),
    [((64, 40), (64, 40), 16), ((37, 70), (33, 41), 3), ((5, 5), (2, 3), 1), ((130, 96), (100, 96), 20)],
)
def test_prefixes_with_additions_are_merged(
    whole: tuple[int, int], prefix: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    """One below the other, the second without an addition; gradients are 0 behind the prefixes."""
    rows, columns = prefix
    shapes = [whole, (rows, rank), (rank, columns), (9, whole[1])]
    tensors = [make(*shape, dtype=torch.float32, seed=seed) for seed, shape in enumerate(shapes)]

    def expected(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, other_OI: Tensor) -> Tensor:
        return torch.cat([weight_OI[:rows, :columns] + 0.5 * b_OR @ a_RI, other_OI[:4, :columns]])

    def ours(weight_OI: Tensor, b_OR: Tensor, a_RI: Tensor, other_OI: Tensor) -> Tensor:
        return merge([Prefix(weight_OI, rows, b_OR, a_RI, 0.5), Prefix(other_OI, 4)], columns, dtype)

    check_against(expected, ours, *tensors, dtype=dtype)


def test_a_frozen_matrix_gets_no_gradient() -> None:
    weight_OI, b_OR, a_RI = (make(*shape, dtype=torch.float32) for shape in ((8, 6), (8, 2), (2, 6)))
    merge([Prefix(weight_OI.detach(), 8, b_OR, a_RI)], 6, torch.float32).sum().backward()
    assert weight_OI.grad is None
    torch.testing.assert_close(b_OR.grad, a_RI.detach().sum(1).expand(8, 2))
