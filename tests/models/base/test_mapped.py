"""Mapped weights leave no memory behind, and are read again as they are on disk; others are left alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.base.mapped import forget_pages, trim_memory

NUMBERS = 2**22
STATUS = Path("/proc/self/status")


def file_bytes() -> int:
    """Return the memory of mapped files."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])


def test_a_mapped_tensor_is_given_back_and_read_again(tmp_path: Path) -> None:
    if not STATUS.exists():
        pytest.skip("needs /proc")
    save_file({"some": torch.ones(5), "weight": torch.arange(NUMBERS).float()}, tmp_path / "m.safetensors")
    weight = load_file(tmp_path / "m.safetensors")["weight"]
    expected = torch.arange(NUMBERS).float()
    assert weight.equal(expected)
    before = file_bytes()
    forget_pages(weight)
    trim_memory()
    assert file_bytes() < before - 3 * NUMBERS
    assert weight.equal(expected)


def test_memory_of_no_file_and_parts_of_rows_are_left_alone() -> None:
    weight = torch.arange(NUMBERS).float().view(4, -1)
    for part in (weight, weight[1:3], weight[:, 5:], weight[0, :3]):
        forget_pages(part)
    assert weight.flatten().equal(torch.arange(NUMBERS).float())
