"""The card of a result: where numbers come from. Every command that measures or generates writes one.

Figures without their commit, command, hardware, threads, dtypes and versions cannot be compared.
"""

import datetime
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from models.machine.card import this_machine

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "nestling",
    "torch",
    "transformers",
    "tokenizers",
    "lightning",
    "datasets",
    "numpy",
    "llama-cpp-python",
    "lm-eval",
)


def make_card(*, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return the card of what this process has just done, for JSON.

    Args:
        dtypes: what ran in which dtype, such as {"model": "bf16", "draft": "fp32"}.

    Returns:
        `commit` (None outside a checkout), `command`, `date` (UTC, ISO), `hardware` (cpu, cores,
        gpu, system), `threads`, `dtypes` and `versions` (python and packages).
    """
    machine = this_machine()
    return {
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": machine.cpu,
            "cores": machine.cores,
            "gpu": machine.gpu,
            "system": platform.platform(),
        },
        "threads": torch.get_num_threads(),
        "dtypes": dict(dtypes),
        "versions": versions(),
    }


def commit(root: Path = ROOT) -> str | None:
    """Return the commit of this code, with `-dirty` if files differ from it; None outside a checkout."""
    if not (root / ".git").exists():  # else git would answer for a repository around the installation
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return None
    return answer.stdout.strip()


def versions() -> dict[str, str]:
    """Return versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
