"""The compiled product equals the plain one, and a row's result is the same bits among any others."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from models.kernels.build import library
from models.kernels.codes import FOUR_BITS, quantize
from models.kernels.matmul import compiled_product
from models.kernels.pack import _pack_compiled, _pack_rows, make_panels

DTYPES = (torch.float32, torch.bfloat16, torch.int8, FOUR_BITS)
# Largest error relative to the largest value: fp32's sums, inputs of 8 bits; of 4-bit weights as rounded.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.int8: 2e-2, FOUR_BITS: 1e-2}


@pytest.fixture(autouse=True)
def _compiled(compiled: None) -> None:
    """All of these run it."""


@pytest.fixture(params=[True, False], ids=["tiles", "no tiles"])
def _tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once as the processor does it, and where it multiplies tiles once as if the system denied them."""
    loaded = library()
    assert loaded is not None
    if request.param:
        yield
        return
    try:
        has_tiles = ctypes.c_int.in_dll(loaded, "nestling_has_tiles")
    except ValueError:
        pytest.skip("this processor multiplies no tiles")
    before, has_tiles.value = has_tiles.value, 0
    yield
    has_tiles.value = before


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 12, 13, 40])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 2), (32, 64), (45, 70), (100, 6)])
def test_it_is_the_product(num_outputs: int, num_inputs: int, num_rows: int, dtype: torch.dtype) -> None:
    weight_OI, x_TI = torch.randn(num_outputs, num_inputs), torch.randn(num_rows, num_inputs)
    product = compiled_product(weight_OI, dtype)
    assert product is not None
    if dtype == FOUR_BITS:
        codes_OI, scales_O1 = quantize(weight_OI, 4)
        weight_OI = codes_OI * scales_O1
    y_TO, exact_TO = product(x_TI), x_TI.double() @ weight_OI.double().T
    assert y_TO.dtype == torch.float32
    assert (y_TO - exact_TO).abs().max() <= TOLERANCES[dtype] * max(1.0, float(exact_TO.abs().max()))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_among_any_others_and_in_any_number_of_threads(dtype: torch.dtype) -> None:
    product = compiled_product(torch.randn(70, 256), dtype)
    assert product is not None
    x_TI = torch.randn(29, 256)
    y_TO = product(x_TI)
    for first, last in ((0, 1), (3, 8), (10, 29)):
        assert product(x_TI[first:last]).equal(y_TO[first:last])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert product(x_TI).equal(y_TO)
    finally:
        torch.set_num_threads(before)


def test_what_it_cannot_run_is_left_to_torch() -> None:
    assert compiled_product(torch.ones(4, 4, dtype=torch.float64)) is None
    assert compiled_product(torch.ones(4, 5, dtype=torch.bfloat16)) is None


def test_panels_are_the_weight_in_another_layout_and_heads_begin_panels() -> None:
    weight_OI = torch.arange(2 * 24 * 6, dtype=torch.float32).view(48, 6)
    heads = make_panels(weight_OI, dtype=torch.float32, head_dim=24).weight
    assert heads.shape == (2, 6, 32, 1)
    assert heads[:, :, :24, 0].transpose(1, 2).reshape(48, 6).equal(weight_OI)
    assert not heads[:, :, 24:].any()
    whole = make_panels(weight_OI, dtype=torch.bfloat16).weight
    assert whole.shape == (2, 3, 32, 2)
    assert whole[1, 2, 5].tolist() == weight_OI.bfloat16()[37, 4:].tolist()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "head_dim"), [(48, 70, 24), (128, 64, 64), (45, 7, 0), (1, 1, 0)]
)
def test_compiled_panels_are_those_of_torch(
    rows: int, columns: int, head_dim: int, source: torch.dtype, dtype: torch.dtype
) -> None:
    weight_OI = torch.randn(rows + 3, columns + 5).to(source)[:rows, :columns]
    weight_OI[0] = 0
    ours, theirs = _pack_compiled(weight_OI, dtype, head_dim), _pack_rows(weight_OI, dtype, head_dim)
    assert ours is not None
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.equal(other)


def test_two_4_bit_codes_share_a_byte() -> None:
    weight_OI = torch.randint(-7, 8, (3, 12)).float()
    weight_OI[:, 0] = 7  # the scale is one
    panels = make_panels(weight_OI, dtype=FOUR_BITS)
    assert panels.weight.shape == (1, 2, 32, 4)
    assert panels.weight[0, 0, 2].bitwise_and(15).tolist() == (weight_OI[2, :4] + 8).tolist()
    assert panels.weight[0, 0, 2].bitwise_right_shift(4).tolist() == (weight_OI[2, 4:8] + 8).tolist()
    assert panels.weight[0, 1, 2].tolist() == (weight_OI[2, 8:] + 8 + 16 * 8).tolist()
    assert panels.num_bytes == 2 * 32 * 4 + 4 * 32


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "most"), [(torch.int8, 127), (FOUR_BITS, 7)])
@pytest.mark.parametrize("num_inputs", [66, 68, 72])
def test_codes_are_exact_where_they_can_be(dtype: torch.dtype, most: int, num_inputs: int) -> None:
    weight_OI = torch.randint(-most, most + 1, (40, num_inputs)).float()
    weight_OI[:, 0] = most  # the scale is one
    x_TI = torch.randint(-127, 128, (5, num_inputs)).float()
    x_TI[:, 1] = -127
    product = compiled_product(weight_OI, dtype)
    assert product is not None
    assert product(x_TI).equal(x_TI @ weight_OI.T)
    assert not product(torch.zeros(2, num_inputs)).any()
