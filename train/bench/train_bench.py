"""`nestling bench --train`: what training a family costs, beside the full model alone and transformers.

    nestling      full    the full model alone, in the same code: the recipe without its family
    nestling      joint   the recipe
    transformers  full    transformers.Trainer on the stock model of the same shape

All train on the recipe's own rows, in the same dtype, a few steps each, round after round in one process, so
that a disturbance hits each alike; a figure is the median over the rounds. What `nestling train` tells the C
library of freed memory (train/run/malloc.py) holds for all of them. Set-up and the first steps of a
round are not timed. Members learn from the divergence from the first step on, which costs more than the
cross-entropy before it. A recipe's teacher teaches the full model alone as well; transformers.Trainer trains
on its tokenizer and on text alone. Peak memory is that of a fresh process for each.
"""

import dataclasses
import multiprocessing
import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.base.dtypes import DTYPES
from models.base.processor import busy_now
from models.base.progress import Bar, progress_bar
from models.base.stopwatch import Clock, alternate
from models.checkpoint.weights import count_elements
from models.machine.card import machine_card, num_threads
from train.bench.trainers import Contender, train_briefly, wait_for_device
from train.data.module import TextData
from train.distill.open import check_teacher
from train.recipe.recipe import Recipe
from train.recipe.sections import SamplerConfig
from train.report.tables import training_table
from train.run.dryrun import estimate_run
from train.run.fit import make_config, make_model
from train.run.malloc import keep_freed_memory
from train.run.speed import training_precision

PRODUCT_SIDE = 2048
"""Side of the square product whose rate is the roof: large enough to reach it, small enough for a second."""


def bench_training(
    recipe: Recipe,
    *,
    rounds: int,
    steps: int,
    console: Console,
) -> dict[str, Any]:
    """Measure a recipe's training, and return the fields of docs/json.md but the card.

    Args:
        recipe: the family, the data and the batch.
        rounds: times that everybody trains.
        steps: timed optimizer steps of each in a round.
        console: shows the progress.
    """
    teacher = check_teacher(recipe)
    keep_freed_memory()
    card, dtype = machine_card(), training_precision(recipe.dtype)
    on_gpu = torch.cuda.is_available() and recipe.trainer.accelerator != "cpu"
    busy = busy_now()
    torch.set_num_threads(1 if busy else num_threads(card, dtype, purpose="training"))
    clock = time.process_time if busy and not on_gpu else time.perf_counter
    contenders, notes = choose_contenders(recipe, dtype)
    data = TextData(contenders[0].recipe).prepare(console)
    roof = measure_roof(dtype, on_gpu=on_gpu, clock=clock)
    with progress_bar("training", len(contenders) * (rounds + 1), console=console) as bar:
        seconds = _train_in_turn(contenders, data, rounds, steps, clock, bar)
        rows = []
        for contender, taken in zip(contenders, seconds, strict=True):
            memory = measure_memory(contender)
            bar.advance()
            config = make_config(contender.recipe, data)
            taught_by = teacher if contender.engine == "nestling" else None
            flops = estimate_run(contender.recipe, config, card, taught_by).flops_per_step
            rows.append(make_row(contender, taken, flops, roof, memory))
    compare(rows)
    if clock is time.process_time:
        notes.append("others kept this machine busy: one thread, and processor time instead of wall time")
    settings = {
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "clock": "processor" if clock is time.process_time else "wall",
        "roof_gflops": roof,
        "parameters": count_elements(make_model(recipe, data)),
        "rounds": rounds,
        "steps": steps,
        "rows_per_step": recipe.trainer.rows_per_step,
        "sequence_length": recipe.data.sequence_length,
    }
    return {"results": rows, **settings, "notes": notes}


def show_training(results: Mapping[str, Any], console: Console) -> None:
    """Print what was trained, a table and notes."""
    hardware = results["card"]["hardware"]
    device = hardware["gpu"] or hardware["cpu"]
    console.print(
        f"{results['parameters']:,} parameters, {results['rows_per_step']} rows of "
        f"{results['sequence_length']} tokens a step, {results['dtype']}, {results['threads']} threads, "
        f"{device}; a matrix product reaches {results['roof_gflops']:,.0f} GFLOP/s",
        markup=False,
    )
    console.print(training_table(results["results"]).to_rich(caption=LEGEND))
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False)


LEGEND = (
    "x full: against nestling full; MFU: of the rate of a matrix product; of it training: above what the "
    "process held before"
)


def _train_in_turn(
    contenders: Sequence[Contender], data: TextData, rounds: int, steps: int, clock: Clock, bar: Bar
) -> list[list[float]]:
    """Return the seconds of a step of each contender, in each round."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, taken in zip(contenders, seconds, strict=True):
            taken.append(train_briefly(contender, data, steps, clock))
            bar.advance()
    return seconds


def choose_contenders(recipe: Recipe, dtype: str) -> tuple[list[Contender], list[str]]:
    """Return everyone that can run here, on one device, and notes on who cannot."""
    joint = dataclasses.replace(
        recipe,
        dtype="bf16" if dtype == "bf16" else "fp32",
        loss=dataclasses.replace(recipe.loss, ramp_start=0, ramp_steps=0),
        trainer=dataclasses.replace(recipe.trainer, devices=1, num_nodes=1, strategy="auto"),
    )
    writer = "student" if recipe.distill.writer in recipe.family else recipe.distill.writer
    full = dataclasses.replace(
        joint,
        family={},
        sampler=SamplerConfig(),
        model=dataclasses.replace(recipe.model, train="joint"),
        distill=dataclasses.replace(recipe.distill, writer=writer),
    )
    contenders = [
        Contender(engine="nestling", mode="full", recipe=full),
        Contender(engine="nestling", mode="joint", recipe=joint),
    ]
    if find_spec("accelerate") is None:
        return contenders, ["transformers.Trainer was left out: it needs `pip install accelerate`"]
    alone = ["transformers.Trainer learns from text alone, without the teacher"]
    notes = alone if recipe.loss.teacher else []
    return [*contenders, Contender(engine="transformers", mode="full", recipe=full)], notes


def measure_roof(dtype: str, *, on_gpu: bool, clock: Clock) -> float:
    """Return the GFLOP/s of a large square product in this dtype, with the threads that training has."""
    device = "cuda" if on_gpu else "cpu"
    a_NN = torch.ones(PRODUCT_SIDE, PRODUCT_SIDE, dtype=DTYPES[dtype], device=device)

    def product() -> None:
        torch.mm(a_NN, a_NN)
        wait_for_device()

    return (
        2e-9 * PRODUCT_SIDE**3 / alternate({"product": product}, budget=1.0, clock=clock).shortest["product"]
    )


def measure_memory(contender: Contender) -> dict[str, int]:
    """Return the peak bytes of a fresh process that trains a few steps; see `_peak`."""
    spawn = multiprocessing.get_context("spawn")  # a fork would start with this process's memory
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak, contender, torch.get_num_threads()).result()


def _peak(contender: Contender, threads: int) -> dict[str, int]:
    """Return peak memory, and how far it is above what was held before the first training step.

    On a GPU that of its allocator; else the resident memory of the process, libraries included.
    """
    torch.set_num_threads(threads)
    if contender.engine == "nestling":
        keep_freed_memory()
    data = TextData(contender.recipe).prepare()
    if torch.cuda.is_available() and contender.recipe.trainer.accelerator != "cpu":
        train_briefly(contender, data, 1, time.perf_counter)
        peak = torch.cuda.max_memory_allocated()
        return {"peak_bytes": peak, "training_bytes": peak}
    if contender.engine == "transformers":
        import transformers.trainer  # noqa: F401 (what libraries take is no cost of training)
    before = _memory_now("VmRSS")
    train_briefly(contender, data, 1, time.perf_counter)
    peak = _memory_now("VmHWM")
    return {"peak_bytes": peak, "training_bytes": peak - before}


def _memory_now(field: str) -> int:
    """Return the resident memory of this process, now or at its peak; elsewhere than on Linux, at its peak.

    Not `ru_maxrss` on Linux, which a new process inherits from the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines[field].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_row(
    contender: Contender, seconds: Sequence[float], flops: float, roof: float, memory: dict[str, int]
) -> dict[str, Any]:
    """Return one contender's figures, without comparisons.

    Args:
        contender: the contender.
        seconds: seconds of a step, by round.
        flops: operations of one step, forward and backward.
        roof: GFLOP/s of a matrix product.
        memory: from `measure_memory`.
    """
    settings = contender.recipe.trainer
    tokens = settings.rows_per_step * contender.recipe.data.sequence_length
    median = statistics.median(seconds)
    return {
        "engine": contender.engine,
        "mode": contender.mode,
        "tokens_per_second": tokens / median,
        "seconds_per_step": median,
        "seconds_per_step_by_round": list(seconds),
        "mfu": flops / median / (roof * 1e9),
        **memory,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its ratios to the first one; the ratio of times is the median of the rounds' own."""
    full = rows[0]
    for row in rows:
        pairs = zip(row["seconds_per_step_by_round"], full["seconds_per_step_by_round"], strict=True)
        row["step_ratio"] = statistics.median(own / alone for own, alone in pairs)
        for name in ("peak", "training"):
            row[f"{name}_ratio"] = row[f"{name}_bytes"] / full[f"{name}_bytes"]
