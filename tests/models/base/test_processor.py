"""The most threads that this process may use, whatever limits them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.base.errors import UsageError
from models.base.processor import is_crowded, usable_cores


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def group(root: Path, name: str, **files: str) -> Path:
    folder = root / name.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file.replace("__", ".")).write_text(content)
    return root


def belongs_to(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "own"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_quota_of_this_processs_own_group_counts(tmp_path: Path) -> None:
    groups = group(tmp_path / "groups", "a/b", cpu__max="300000 100000\n")
    assert usable_cores(groups, belongs_to(tmp_path, "0::/a/b")) == 3
    assert usable_cores(groups, belongs_to(tmp_path, "0::/a")) == 16


def test_the_smallest_quota_around_it_counts(tmp_path: Path) -> None:
    groups = group(tmp_path / "groups", "a/b", cpu__max="max 100000\n")
    group(groups, "a", cpu__max="250000 100000\n")
    group(groups, "", cpu__max="800000 100000\n")
    assert usable_cores(groups, belongs_to(tmp_path, "0::/a/b")) == 2


def test_the_older_kind_of_groups_counts(tmp_path: Path) -> None:
    groups = group(
        tmp_path / "groups", "cpu,cpuacct/job", cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000"
    )
    own = belongs_to(tmp_path, "5:memory:/job", "4:cpu,cpuacct:/job", "0::/")
    assert usable_cores(groups, own) == 4
    group(groups, "cpu,cpuacct/job", cpu__cfs_quota_us="-1")
    assert usable_cores(groups, own) == 16


@pytest.mark.parametrize("content", ["", "max", "nonsense here", "0 0", "50000 100000"])
def test_an_odd_quota_leaves_at_least_one_core(content: str, tmp_path: Path) -> None:
    groups = group(tmp_path / "groups", "", cpu__max=content)
    assert usable_cores(groups, belongs_to(tmp_path, "0::/")) in (1, 16)


@pytest.mark.parametrize(("value", "expected"), [("4", 4), (" 4 ", 4), ("4,2", 4), ("99", 16), ("", 16)])
def test_omp_num_threads_is_the_most_that_is_used(
    value: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_cores(tmp_path, tmp_path / "none") == expected


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5", ",2"])
def test_an_omp_num_threads_that_is_none_is_named(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UsageError, match=r"^OMP_NUM_THREADS=.*: give a number of threads"):
        usable_cores(tmp_path, tmp_path / "none")


FORKS = """
import multiprocessing, os, sys, torch
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.decode.engine.engine import stream
from models.packed.quantize import pack
from models.base.processor import usable_cores, is_crowded

torch.set_num_threads(4)
config = ElasticConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2)
model = ElasticLM(config)
model.init_weights(torch.Generator().manual_seed(0))
model = pack(model.eval(), "fp32")

def decode():
    return [token.id for token in stream(model, [1, 2, 3], max_new_tokens=8)]

expected = decode()

def child():
    assert usable_cores() == 1
    assert torch.get_num_threads() == 1
    os._exit(0 if decode() == expected else 3)

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(600)
if process.exitcode is None:
    process.kill()
    sys.exit(9)
sys.exit(process.exitcode)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_that_was_forked_after_threads_were_used_decodes_alone() -> None:
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", FORKS], check=False, env=variables, timeout=900)
    assert done.returncode == 0


@pytest.mark.parametrize(("running", "crowded"), [(1, False), (2, True), (5, True)])
def test_a_machine_is_crowded_where_others_want_the_cores_that_are_ours(
    running: int, crowded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {running}/345 6789\n")
    assert is_crowded(tmp_path / "loadavg") is crowded
    assert not is_crowded(tmp_path / "nowhere")
    monkeypatch.setattr("os.cpu_count", lambda: 64)  # a part of a large machine
    assert not is_crowded(tmp_path / "loadavg")
