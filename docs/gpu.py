"""The checks of a machine with a GPU, unattended and in under eight minutes; `make gpu` runs it.

    python docs/gpu.py [--out checkpoints/gpu]

The tests marked `gpu` run first, then plain and drafted decoding and a few training steps on random
weights of three published shapes. Every step has a time limit, and one that fails does not stop the next.
Results are JSON: a file for each step, and `gpu.json` with the exit code and seconds of all. `--anyway` tries
the script itself on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SHAPES = ("125M", "350M", "1B")
NESTLING = [sys.executable, "-c", "import nestling; raise SystemExit(nestling.main())"]
BRIEFLY = {"tests": 90, "decode": 55, "train": 65}
"""Seconds that a step may take; one tests, and one decode and train for each shape: 450 in all."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the check, and how long it may take."""

    name: str
    command: Sequence[str]
    seconds: int


def main() -> int:
    """Run all steps; return 0 if every one of them did, or where there is no GPU."""
    parser = argparse.ArgumentParser(description="check a machine with a GPU in under eight minutes")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/gpu"), help="folder of the results")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="Sizes of nestling bench --random.")
    parser.add_argument("--anyway", action="store_true", help="run without a GPU, to try the script")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.anyway:
        print("make gpu: there is no CUDA device here; nothing to check")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    done = []
    for step in steps(options.out, options.shapes):
        done.append(run(step, options.out))
        (options.out / "gpu.json").write_text(json.dumps({"device": device(), "steps": done}, indent=1))
    return int(any(step["exit_code"] for step in done))


def steps(out: Path, shapes: Sequence[str]) -> Iterator[Step]:
    """Yield the commands, the most telling first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    yield Step(name="tests", command=pytest, seconds=BRIEFLY["tests"])
    for shape in shapes:
        words = ["bench", "--random", shape, "--alpha", "0.8", "--dtype", "bf16", "--engine", "nestling"]
        words += ["--num-prompts", "2", "--max-new-tokens", "64", "--rounds", "3"]
        words += ["--json", str(out / f"decode-{shape}.json")]
        yield Step(name=f"decode-{shape}", command=[*NESTLING, *words], seconds=BRIEFLY["decode"])
    for shape in shapes:
        words = ["bench", "--train", "--rounds", "1", "--steps", "4", *recipe_of(shape)]
        words += ["--json", str(out / f"train-{shape}.json")]
        yield Step(name=f"train-{shape}", command=[*NESTLING, *words], seconds=BRIEFLY["train"])


def recipe_of(shape: str) -> list[str]:
    """Return the recipe keys of a shape, trained in bf16 on rows of 512 tokens of Python's own source."""
    from models.bench.random_models import SHAPES as CONFIGS

    config = CONFIGS[shape]
    heads = ("num_attention_heads", "num_key_value_heads")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", *heads)
    data = {"source": "stdlib", "vocab_size": 8192, "sequence_length": 512, "max_documents": 2000}
    return [
        *(f"model.{name}={getattr(config, name)}" for name in names),
        *(f"data.{name}={value}" for name, value in data.items()),
        *("dtype=bf16", "trainer.batch_size=8", "trainer.max_steps=100", "tracking.wandb=disabled"),
    ]


def run(step: Step, out: Path) -> dict[str, object]:
    """Run a step, keep what it prints in a file, and tell how it went."""
    print(f"{step.name} ...", flush=True)
    started = time.monotonic()
    with (out / f"{step.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                step.command, stdout=log, stderr=subprocess.STDOUT, timeout=step.seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    seconds = round(time.monotonic() - started, 1)
    print(f"{step.name}: exit code {code} after {seconds} s; see {out / step.name}.log", flush=True)
    return {"name": step.name, "exit_code": code, "seconds": seconds}


def device() -> str:
    """Return the GPU's name, or the processor's architecture without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
