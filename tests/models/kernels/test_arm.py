"""On Arm the same sources give the same results: they are cross-compiled and run under emulation."""

import copy
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.kernels.build import FLAGS, HERE
from models.kernels.codes import FOUR_BITS, quantize
from models.kernels.pack import Panels, make_panels

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
PROCESSORS = {"NEON": "armv8-a", "dot product": "armv8.2-a+dotprod", "i8mm": "armv8.6-a"}
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.int8: 2e-2, FOUR_BITS: 1e-2}
NUM_TOKENS, NUM_DRAWS = 21, 4


@pytest.fixture(scope="module", params=[*PROCESSORS.values()], ids=[*PROCESSORS])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name, package in ((COMPILER, "gcc-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(name) is None:
            pytest.skip(f"needs {name}: apt-get install {package}")
    path = tmp_path_factory.mktemp("arm") / "program"
    flags = [flag for flag in FLAGS if not flag.startswith(("-march", "-mprefer", "-shared", "-fPIC", "-O3"))]
    source = Path(__file__).parent / "emulated.c"
    command = [COMPILER, *flags, "-O2", f"-march={request.param}", f"-I{HERE}", "-static", str(source)]
    subprocess.run([*command, "-o", str(path), "-lm"], check=True)
    return path


def run(program: Path, *parts: bytes) -> bytes:
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", str(program)], input=b"".join(parts), capture_output=True, check=True
    )
    return done.stdout


def ints(*values: int) -> bytes:
    return struct.pack(f"{len(values)}i", *values)


def array(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return ints(0)
    data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return ints(len(data)) + data


def as_map(panels: Panels) -> bytes:
    return ints(panels.type, panels.weight.shape[1]) + array(panels.weight) + array(panels.scales_PO)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_rows", [1, 3, 8, 13])
def test_products_are_those_of_the_weights(program: Path, dtype: torch.dtype, num_rows: int) -> None:
    weight_OI, x_TI = torch.randn(45, 70), torch.randn(num_rows, 70)
    given = as_map(make_panels(weight_OI, dtype=dtype))
    y_TO = torch.frombuffer(
        bytearray(run(program, ints(0), given, ints(45, 70, num_rows), array(x_TI))), dtype=torch.float32
    )
    weight_OI = weight_OI.to(dtype).float() if dtype.is_floating_point else weight_OI
    if dtype == FOUR_BITS:
        codes_OI, scales_O1 = quantize(weight_OI, 4)
        weight_OI = codes_OI * scales_O1
    exact_TO = x_TI.double() @ weight_OI.double().T
    assert (y_TO.view(num_rows, 45) - exact_TO).abs().max() <= TOLERANCES[dtype] * exact_TO.abs().max()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_pass_is_torchs_and_the_same_bits_in_any_cut(
    program: Path, dtype: torch.dtype, tiny_config: ElasticConfig
) -> None:
    model = ElasticLM(tiny_config)
    model.init_weights(torch.Generator().manual_seed(0))
    ids_T = torch.arange(NUM_TOKENS) * 7 % tiny_config.vocab_size
    uniforms = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for num_passes in (1, 5):
        request = (ints(64, NUM_TOKENS, num_passes, NUM_DRAWS), array(ids_T), array(uniforms))
        found.append(run(program, ints(1), as_passes(model, dtype), *request))
    assert found[0] == found[1]
    split = len(found[0]) - 8 * NUM_DRAWS
    rows_TV = torch.frombuffer(bytearray(found[0][:split]), dtype=torch.float32).view(
        -1, tiny_config.vocab_size
    )
    drawn = struct.unpack(f"{NUM_DRAWS}q", found[0][split:])
    read_T = torch.cat([ids_T, torch.tensor(drawn[:-1])])
    exact_TV = (rounded(model) if dtype == FOUR_BITS else model)(read_T[None])[0]
    logits_TV, distributions_TV = rows_TV[: NUM_TOKENS - 1], rows_TV[NUM_TOKENS - 1 :]
    rounding = 1e-5 if dtype == torch.float32 else 0.06
    assert (logits_TV - exact_TV[: NUM_TOKENS - 1]).norm() < rounding * exact_TV.norm()
    if dtype == torch.float32:
        torch.testing.assert_close(
            distributions_TV, exact_TV[NUM_TOKENS - 1 :].softmax(-1), rtol=1e-4, atol=1e-6
        )
    for token, row_V, uniform in zip(drawn, distributions_TV, uniforms, strict=True):
        cumulative_V = row_V.double().cumsum(0)
        assert token == int(torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True))


def rounded(model: ElasticLM) -> ElasticLM:
    """Return a copy with the weights that 4 bits keep."""
    model = copy.deepcopy(model)
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            codes_OI, scales_O1 = quantize(linear.weight.detach(), 4)
            linear.weight = nn.Parameter(codes_OI * scales_O1)
    return model


def as_passes(model: ElasticLM, dtype: torch.dtype) -> bytes:
    config = model.config
    width = config.num_attention_heads * config.head_dim
    sizes = (config.hidden_size, config.head_dim, config.heads_per_group, width, config.intermediate_size)
    parts = [ints(*sizes, config.num_hidden_layers, config.vocab_size, config.num_key_value_heads)]
    weights = model.state_dict()
    for index in range(config.num_hidden_layers):
        names = [
            *(f"self_attn.{one}_proj" for one in "qkvo"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        ]
        for name in names:
            head_dim = config.head_dim if name[-6] in "qkv" and "attn" in name else 0
            weight_OI = weights[f"model.layers.{index}.{name}.weight"]
            parts.append(as_map(make_panels(weight_OI, dtype=dtype, head_dim=head_dim)))
        norms = [
            f"model.layers.{index}.{one}.weight" for one in ("input_layernorm", "post_attention_layernorm")
        ]
        parts += [array(weights[name]) for name in norms]
    parts.append(as_map(make_panels(model.lm_head.weight, dtype=dtype)))
    rotary = (model.rotary.cos_TK.float(), model.rotary.sin_TK.float())
    parts += map(array, (model.model.embed_tokens.weight, *rotary, weights["model.norm.weight"]))
    return b"".join(parts)
