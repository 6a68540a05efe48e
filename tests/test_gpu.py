"""The check of a machine with a GPU fits into its time, runs what exists, and says where there is none."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bench.random_models import SHAPES
from train.recipe.recipe import load_recipe

SCRIPT = Path(__file__).parents[1] / "docs" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["make gpu: there is no CUDA device here; nothing to check"]


def test_all_steps_together_take_less_than_eight_minutes(gpu: Any, tmp_path: Path) -> None:
    steps = list(gpu.steps(tmp_path, gpu.SHAPES))
    assert len(steps) == 1 + 2 * len(gpu.SHAPES)
    assert sum(step.seconds for step in steps) < 8 * 60


def test_it_trains_the_shapes_that_it_decodes(gpu: Any) -> None:
    for shape in gpu.SHAPES:
        model = load_recipe([], gpu.recipe_of(shape)).model
        assert model.num_hidden_layers == SHAPES[shape].num_hidden_layers
        assert model.hidden_size == SHAPES[shape].hidden_size


def test_a_step_that_takes_too_long_or_fails_is_told_and_does_not_stop_the_next(
    gpu: Any, tmp_path: Path
) -> None:
    codes = []
    slow = ("import time; time.sleep(99)", 1)
    for code, seconds in (slow, ("raise SystemExit(3)", 99), ("print('fine')", 99)):
        step = gpu.Step(name="step", command=[sys.executable, "-c", code], seconds=seconds)
        codes.append(gpu.run(step, tmp_path)["exit_code"])
    assert codes == [124, 3, 0]
    assert (tmp_path / "step.log").read_text() == "fine\n"
