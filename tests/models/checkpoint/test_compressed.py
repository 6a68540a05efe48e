"""Matrices in few bits: the format is compressed-tensors' own, and opens here and in transformers equally."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models.base.errors import NestlingError, UsageError
from models.checkpoint.compressed import (
    BITS,
    compress,
    count_compressed_bytes,
    decompress,
    pack_codes,
    unpack_codes,
)
from models.checkpoint.extract import extract, verify_extraction
from models.checkpoint.folder import load_model
from models.checkpoint.layout import lay_out
from models.checkpoint.tensor_file import write_tensor_file
from models.checkpoint.weights import read_tensors
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.view import View
from tests.models.checkpoint.test_extract import make_folder

compressed_tensors = pytest.importorskip("compressed_tensors", reason="needs the extra `compressed`")
ROUNDING = {"int8": 2**-6, "int4": 2**-2}
"""By how much the weights of a row may differ, relative to their root mean square."""


@pytest.mark.parametrize("bits", BITS.values())
def test_codes_are_packed_as_the_package_packs_them(bits: int) -> None:
    pack_to_int32 = compressed_tensors.compressors.pack_quantized.pack_to_int32
    least, shape = -(1 << (bits - 1)), (5, 64)
    codes_OI = torch.randint(least, -least, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(pack_codes(codes_OI, bits), pack_to_int32(codes_OI, bits))
    assert torch.equal(unpack_codes(pack_codes(codes_OI, bits), bits), codes_OI)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("text", ["S", "ffn=1:0.5:1:1", "ffn=0.5,heads=0.5,layers=0:2"])
def test_a_folder_opens_here_and_in_transformers_equally(
    tiny_config: ElasticConfig, tmp_path: Path, dtype: str, text: str
) -> None:
    config = dataclasses.replace(tiny_config, intermediate_size=256, head_dim=32)
    family = make_folder(tmp_path / "model", config)
    out = extract(family, Granularity.parse(text), tmp_path / "out", dtype=dtype)
    opened = load_model(out)
    assert verify_extraction(opened, FULL, out, num_new_tokens=8).holds
    layout = lay_out(View(family.model, Granularity.parse(text)))
    found = decompress(read_tensors(out / "model.safetensors"), json.loads((out / "config.json").read_text()))
    for name, tensor in layout.tensors.items():
        bound = 0 if "norm" in name or "embed" in name else ROUNDING[dtype] ** 2
        errors = (found[name] - tensor).square().mean(-1)
        assert bool((errors <= bound * tensor.square().mean(-1)).all()), name
    stored = compress(layout, dtype).stored
    assert count_compressed_bytes(layout, dtype, 4) == sum(tensor.nbytes for tensor in stored.values())


def test_scales_are_those_that_the_codes_were_rounded_with(
    tiny_config: ElasticConfig, tmp_path: Path
) -> None:
    family = make_folder(tmp_path / "model", tiny_config)
    family.model.to(torch.bfloat16)
    out = extract(family, FULL, tmp_path / "out", dtype="int8")
    tensors = read_tensors(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert tensors[f"{name}_scale"].dtype == torch.bfloat16
    weight_OI = family.model.state_dict()[name].float()
    scale_O1 = tensors[f"{name}_scale"].float()
    found_OI = unpack_codes(tensors[f"{name}_packed"], 8) * scale_O1
    codes_OI = weight_OI / scale_O1
    assert bool(
        ((found_OI - weight_OI).abs() <= (0.5 + (codes_OI.abs() - 127).relu()) * scale_O1 + 1e-7).all()
    )
    ours, theirs = load_model(out).model.state_dict()[name], found_OI.to(torch.bfloat16)
    assert torch.equal(ours, theirs)


def test_a_width_that_is_no_multiple_is_refused_and_leaves_nothing(
    tiny_config: ElasticConfig, tmp_path: Path
) -> None:
    family = make_folder(tmp_path / "model", tiny_config)
    with pytest.raises(UsageError, match=r"--dtype int4 packs 32 numbers.*down_proj"):
        extract(family, Granularity.parse("ffn=0.3"), tmp_path / "out", dtype="int4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_part_that_is_missing_and_another_scheme_are_named(
    tiny_config: ElasticConfig, tmp_path: Path
) -> None:
    out = extract(make_folder(tmp_path / "model", tiny_config), FULL, tmp_path / "out", dtype="int4")
    # copies: the file that they are mapped from is written over
    tensors = {name: one.clone() for name, one in read_tensors(out / "model.safetensors").items()}
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    write_tensor_file(out / "model.safetensors", tensors)
    with pytest.raises(NestlingError, match=r"model\.layers\.1\.mlp\.up_proj lacks one of weight_packed"):
        load_model(out)
    fields = json.loads((out / "config.json").read_text())
    fields["quantization_config"]["format"] = "float-quantized"
    (out / "config.json").write_text(json.dumps(fields))
    with pytest.raises(NestlingError, match="save the weights unquantized"):
        load_model(out)
