"""What docs/scaling.md says of memory and traffic is what two processes do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_table_of_the_page_is_what_two_processes_measure_and_arithmetic_counts() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "scaling.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[2:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    for ddp_counted, ddp_measured, fsdp_counted, fsdp_measured in rows:
        assert (ddp_counted, fsdp_counted) == (ddp_measured, fsdp_measured)
