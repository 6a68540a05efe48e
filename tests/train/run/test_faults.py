"""Runs that are killed, damaged or short of disk can all be resumed, and leave nothing lying about."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.base.errors import NestlingError
from models.elastic.model import ElasticLM
from train.recipe.sections import OptimConfig
from train.run.optim import make_optimizer
from train.run.state import newest_state, save_state

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("kills", "damages", "disks"), [(5, 2, 1), pytest.param(100, 24, 16, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_moment_damaged_or_short_of_disk_ends_as_the_one_that_was_not(
    tmp_path: Path, kills: int, damages: int, disks: int
) -> None:
    """Real processes, SIGKILL at random: half of them at any moment, half amid writing a state."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from tests.train.run.kills import main; main()"),
            *map(str, (tmp_path, kills, damages, disks, 0)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["killed"]["kills"] == kills
    assert results["killed"]["finished_and_equal"] > 0
    assert results["damaged"] == {"damaged": damages, "finished_and_equal": damages}
    if results["filled"] is not None:  # it takes the right to mount
        assert results["filled"]["finished_and_equal"] == disks


@pytest.mark.parametrize("room", [0, 1, 100, 1000, 5000, 20_000, 40_000, 80_000])
def test_a_disk_that_takes_no_more_bytes_costs_nothing_but_the_new_state(
    tiny_model: ElasticLM, tmp_path: Path, room: int
) -> None:
    """The system refuses every byte of a file beyond `room`, in Python and in safetensors' Rust alike."""
    optimizer = make_optimizer(tiny_model, OptimConfig())
    save_state(tmp_path, tiny_model, optimizer, step=1, tokens=1, keep=2)
    tiny_model(torch.arange(20)[None]).sum().backward()
    optimizer.step()
    assert max(sum(p.numel() for p in tiny_model.parameters()) * 4, 80_001) > room
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(NestlingError, match="cannot write"):
            save_state(tmp_path, tiny_model, optimizer, step=2, tokens=2, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    state, damaged = newest_state(tmp_path)
    assert state is not None
    assert (state.step, damaged) == (1, [])
