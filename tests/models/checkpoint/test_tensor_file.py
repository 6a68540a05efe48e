"""The file is the library's own, byte for byte, whatever tensors it holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint.tensor_file import DTYPES, write_tensor_file


def make_tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "a": (3, 5),
        "layers.10.w": (2, 4),
        "layers.2.w": (7,),
        "é ": (1,),
        "scalar": (),
        "empty": (0, 4),
    }
    tensors = {
        f"{name}.{number}": (torch.arange(7 * 5)[: max(1, torch.Size(shape).numel())]).to(dtype)
        for number, dtype in enumerate(DTYPES)
        for name, shape in shapes.items()
    }
    return {
        name: tensor[: torch.Size(shapes[name.rpartition(".")[0]]).numel()].reshape(
            shapes[name.rpartition(".")[0]]
        )
        for name, tensor in tensors.items()
    }


def test_it_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = make_tensors()
    write_tensor_file(tmp_path / "ours", tensors)
    save_file({name: one.clone() for name, one in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("change", ["slice", "transpose"])
def test_a_tensor_in_any_layout_is_written_as_it_reads(tmp_path: Path, change: str) -> None:
    whole = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    tensor = whole[:, :20] if change == "slice" else whole.T
    write_tensor_file(tmp_path / "m", {"w": tensor})
    assert torch.equal(load_file(tmp_path / "m")["w"], tensor)
