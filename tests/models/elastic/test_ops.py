"""Operations run compiled where one trains on a CPU, and round as they say."""

import pytest
import torch

from models.elastic.compiled import compiled_dtype
from models.elastic.config import ElasticConfig
from models.elastic.layers import Rotary
from models.elastic.ops import rotate
from models.kernels.build import library


def test_a_rotation_under_autocast_is_rounded_once(tiny_config: ElasticConfig) -> None:
    """Tables in fp32 and vectors in bf16: as if the vectors had been fp32, with a gradient in bf16."""
    tables = Rotary(tiny_config)(slice(5), torch.float32)
    x_BTHK = torch.randn(2, 5, 2, tiny_config.head_dim).bfloat16().requires_grad_()
    turned = rotate(x_BTHK, *tables)
    assert torch.equal(turned, rotate(x_BTHK.float(), *tables))
    assert torch.autograd.grad(turned.sum(), x_BTHK)[0].dtype == torch.bfloat16


def test_compiled_functions_run_where_one_trains_on_a_cpu_in_fp32_or_bf16() -> None:
    if library("train_ops") is None:
        pytest.skip("needs a C compiler")
    x = torch.randn(2, 4, requires_grad=True)
    assert compiled_dtype(x) == torch.float32
    assert compiled_dtype(x.bfloat16()) == torch.bfloat16
    assert compiled_dtype(x.double()) is None
    assert compiled_dtype(x.detach()) is None
    with torch.no_grad():
        assert compiled_dtype(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled_dtype(x) == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert compiled_dtype(x) is None
