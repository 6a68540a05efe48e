"""Weights in a file's blocks: dequantized as llama.cpp does, multiplied without rounding them again."""

import copy

import gguf
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels.blocks import BLOCK, KINDS, BlockTensor, block_product, round_inputs
from models.kernels.matmul import compiled_product
from models.kernels.pack import make_panels

RTOL = 1e-6
"""Of sums in fp32, relative to the largest."""


def make_blocks(kind: str, num_outputs: int, num_inputs: int) -> BlockTensor:
    weight_OI = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))
    found = gguf.quants.quantize(weight_OI.numpy(), gguf.GGMLQuantizationType[kind])
    return BlockTensor(torch.from_numpy(found).unflatten(1, (-1, KINDS[kind])), kind)


def dense(weight: BlockTensor) -> Tensor:
    data = weight.blocks_OBY.flatten(1).numpy()
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[weight.kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_llama_cpp(kind: str) -> None:
    weight = make_blocks(kind, 5, 96)
    assert weight.dequantize().equal(dense(weight))
    assert weight.nbytes == 5 * 3 * KINDS[kind]


def test_torch_computes_with_the_numbers_whatever_it_is_asked() -> None:
    weight = nn.Parameter(make_blocks("Q4_1", 40, 64), requires_grad=False)
    exact, x = dense(make_blocks("Q4_1", 40, 64)), torch.randn(3, 64)
    assert isinstance(weight, BlockTensor)
    for given in (weight.T, weight.float(), weight + 0, torch.cat([weight]), weight.contiguous()):
        assert not isinstance(given, BlockTensor)
    assert F.linear(x, weight).equal(F.linear(x, exact))
    assert weight.to(torch.bfloat16).equal(exact.bfloat16())
    assert copy.deepcopy(weight).equal(exact)
    assert weight[3].equal(exact[3])
    assert weight[:7, :33].equal(exact[:7, :33])
    assert (weight.shape, weight.dtype, weight.device.type) == (exact.shape, exact.dtype, "cpu")


@pytest.mark.parametrize("inference", [True, False])
def test_rows_and_whole_blocks_of_columns_stay_in_blocks(inference: bool) -> None:
    weight, rows = make_blocks("Q8_0", 40, 96), torch.tensor([3, 1])
    exact = dense(weight)
    with torch.inference_mode(inference):
        for part, numbers in (
            (weight.detach(), exact),
            (weight[rows], exact[rows]),
            (weight[:9], exact[:9]),
            (weight[4:9, :64], exact[4:9, :64]),
        ):
            assert isinstance(part, BlockTensor)
            assert part.dequantize().equal(numbers)
        assert F.embedding(rows.unsqueeze(0), weight).equal(exact[rows].unsqueeze(0))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 32), (45, 96), (100, 576)])
def test_the_compiled_product_is_that_of_rounded_inputs(kind: str, num_outputs: int, num_inputs: int) -> None:
    weight = make_blocks(kind, num_outputs, num_inputs)
    product = compiled_product(weight)
    assert product is not None
    for num_rows in (1, 2, 3, 6, 7, 13, 40):
        x_TI = torch.randn(num_rows, num_inputs)
        exact_TO = round_inputs(x_TI).double() @ dense(weight).double().T
        y_TO, torchs_TO = product(x_TI), block_product(weight)(x_TI)
        for found_TO in (y_TO, torchs_TO):
            assert (found_TO - exact_TO).abs().max() <= RTOL * exact_TO.abs().max()
        assert product(x_TI[-1:])[0].equal(y_TO[-1])  # the same bits among any others


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_codes_do_not_overflow(kind: str) -> None:
    weight = make_blocks(kind, 32, 64)
    weight.blocks_OBY[..., -(BLOCK if kind == "Q8_0" else BLOCK // 2) :] = {"Q8_0": 0x80}.get(kind, 0xFF)
    product = compiled_product(weight)
    assert product is not None
    for x_TI in (torch.full((2, 64), 127.0), torch.full((2, 64), -127.0)):
        exact_TO = x_TI.double() @ dense(weight).double().T
        assert (product(x_TI) - exact_TO).abs().max() <= RTOL * exact_TO.abs().max()


def test_panels_are_as_large_as_the_file() -> None:
    for kind in KINDS:
        weight = make_blocks(kind, 64, 96)
        panels = make_panels(weight)
        assert panels.num_bytes == weight.nbytes
        heads = make_panels(weight, head_dim=16)  # each begins a panel of its own
        assert heads.num_bytes == 2 * weight.nbytes
