"""A run that is told to stop: real processes, real signals."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.checkpoint.folder import load_model
from train.run.metrics import read_metrics
from train.run.state import newest_state

SETTINGS = (
    "model.hidden_size=16 model.intermediate_size=32 model.num_hidden_layers=2 "
    "model.num_attention_heads=2 model.num_key_value_heads=1 family={D: layers=0} "
    "data.vocab_size=270 data.sequence_length=16 data.valid_fraction=0.3 trainer.batch_size=2 "
    "trainer.log_every_n_steps=1 trainer.val_check_interval=1000 trainer.limit_val_batches=1 "
    "trainer.checkpoint_every=100000 trainer.accelerator=cpu tracking.wandb=disabled "
    "tracking.tensorboard=false dtype=fp32"
)


Start = Callable[[list[str]], subprocess.Popen[str]]
Wait = Callable[[Callable[[], object]], None]
WaitFor = Callable[[subprocess.Popen[str], Callable[[], bool]], None]


def command(folder: Path, max_steps: int, *more: str) -> list[str]:
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"line {n} of a text about nothing" for n in range(200)))
    settings = SETTINGS.replace("{D: layers=0}", "{D:layers=0}").split()
    settings = [word.replace("{D:layers=0}", "{D: layers=0}") for word in settings]
    return [
        *(sys.executable, "-c", "import sys; from train.cli import main; sys.exit(main())", "train"),
        *settings,
        f"trainer.max_steps={max_steps}",
        f"data.source={text}",
        f"data.cache_dir={folder / 'cache'}",
        *more,
        *("--out", str(folder / "run")),
    ]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process in a group of its own, which a signal can reach as a whole; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start_one(words: list[str]) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
        return processes[-1]

    yield start_one
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def wait_while_it_runs(wait_until: Wait) -> WaitFor:
    """Wait for a condition that a process brings about; fail with what it says if it ends before."""

    def wait(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
        def true_and_running() -> bool:
            assert process.poll() is None, process.communicate()
            return true()

        wait_until(true_and_running)

    return wait


def num_in_group(group: int) -> int:
    """Processes of a group that still run, by what the system tells; a zombie runs no more."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            count += int(of) == group and state != "Z"
    return count


@pytest.mark.parametrize(
    ("number", "code", "num_workers", "everyone"),
    [(signal.SIGTERM, 143, 2, True), (signal.SIGINT, 130, 0, False), (signal.SIGUSR1, 143, 0, False)],
)
def test_a_signal_finishes_the_step_saves_and_says_so_by_the_exit_code(
    start: Start,
    wait_while_it_runs: WaitFor,
    wait_until: Wait,
    tmp_path: Path,
    number: int,
    code: int,
    num_workers: int,
    everyone: bool,
) -> None:
    """Also when workers load the data and get the signal like everyone else."""
    more = f"data.num_workers={num_workers}"
    process = start(command(tmp_path, 10**6, more))
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_while_it_runs(process, lambda: len(read_metrics(metrics)) >= 3)
    wait_while_it_runs(process, lambda: num_in_group(process.pid) == 1 + num_workers)
    os.killpg(process.pid, number) if everyone else process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    wait_until(lambda: num_in_group(process.pid) == 0)
    state, damaged = newest_state(tmp_path / "run" / "steps")
    assert state is not None
    assert damaged == []
    last = max(line["step"] for line in read_metrics(metrics))
    assert state.step == last
    assert f"stopped after step {last}" in output
    assert not (tmp_path / "run" / "model").exists(), "an unfinished run has no model to mistake for one"

    if number == signal.SIGTERM:
        done = subprocess.run(command(tmp_path, last + 2, more), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"resuming at step {last}" in done.stdout
        assert load_model(tmp_path / "run" / "model").provenance["steps"] == last + 2


def test_a_second_signal_ends_the_run_and_its_workers_amid_a_step(
    start: Start, wait_while_it_runs: WaitFor, wait_until: Wait, tmp_path: Path
) -> None:
    process = start(command(tmp_path, 10, "trainer.accumulate_grad_batches=5000", "data.num_workers=2"))
    steps = tmp_path / "run" / "steps"
    wait_while_it_runs(process, lambda: (steps / "00000000").is_dir() and num_in_group(process.pid) == 3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step, which has 5000 batches"
    while process.poll() is None:  # two that come while the process does not run are one to it
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (143, "")
    wait_until(lambda: num_in_group(process.pid) == 0)
    assert [path.name for path in steps.iterdir()] == ["00000000"]
