"""A run that is told to stop: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.checkpoint import load_model
from train.metrics import read_metrics
from train.state import newest_state

SETTINGS = (
    "model.hidden_size=16 model.intermediate_size=32 model.num_hidden_layers=2 "
    "model.num_attention_heads=2 model.num_key_value_heads=1 family={D: layers=0} "
    "data.vocab_size=270 data.sequence_length=16 data.valid_fraction=0.3 trainer.batch_size=2 "
    "trainer.log_every_n_steps=1 trainer.val_check_interval=1000 trainer.limit_val_batches=1 "
    "trainer.checkpoint_every=100000 trainer.accelerator=cpu tracking.wandb=disabled "
    "tracking.tensorboard=false dtype=fp32"
)


def command(folder: Path, max_steps: int) -> list[str]:
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
        *("--out", str(folder / "run")),
    ]


def wait_for_steps(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder / "run" / "metrics.jsonl")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so_by_the_exit_code(
    tmp_path: Path, number: int, code: int
) -> None:
    process = subprocess.Popen(
        command(tmp_path, 10**6),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for_steps(tmp_path, process, 3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    state, damaged = newest_state(tmp_path / "run" / "steps")
    assert state is not None
    assert damaged == []
    last = max(line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert state.step == last
    assert f"stopped after step {last}" in output
    assert not (tmp_path / "run" / "model").exists(), "an unfinished run has no model to mistake for one"

    done = subprocess.run(command(tmp_path, last + 2), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {last}" in done.stdout
    assert load_model(tmp_path / "run" / "model").provenance["steps"] == last + 2
