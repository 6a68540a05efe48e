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

import contextlib
import dataclasses
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console

from models.base.dtypes import DTYPES
from models.base.processor import busy_now
from models.base.stopwatch import Clock, alternate
from models.checkpoint.huggingface import to_hugging_face
from models.elastic.model import ElasticLM
from models.machine.card import machine_card, num_threads
from train.data.module import TextData
from train.recipe.recipe import Recipe
from train.recipe.sections import SamplerConfig
from train.run.dryrun import estimate_run
from train.run.fit import OUR_OWN, make_config, make_model, training_precision
from train.run.malloc import keep_freed_memory
from train.run.module import JointModule
from train.run.teacher import check_teacher, open_teacher

PRODUCT_SIDE = 2048
"""Of the square product whose rate is the roof: large enough to reach it, small enough for a second."""

WARM_STEPS = 5
"""Not timed: while a step's arrays find their places the system is asked for memory, as later it is not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """Who trains, and what."""

    engine: str
    mode: str
    recipe: Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBench:
    """The measurements; `results` has a row for each contender, the full model alone first."""

    results: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str]


def bench_training(
    recipe: Recipe,
    *,
    rounds: int,
    steps: int,
    console: Console,
    progress: Callable[[], None] = lambda: None,
) -> TrainingBench:
    """Measure a recipe's training.

    Args:
        recipe: the family, the data and the batch.
        rounds: times that everybody trains.
        steps: timed optimizer steps of each in a round.
        console: for the data's progress.
        progress: called after each training.
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
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for contender, taken in zip(contenders, seconds, strict=True):
            taken.append(train_briefly(contender, data, steps, clock))
            progress()
    rows = []
    for contender, taken in zip(contenders, seconds, strict=True):
        memory = measure_memory(contender)
        progress()
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
        "parameters": sum(p.numel() for p in make_model(recipe, data).parameters()),
        "rounds": rounds,
        "steps": steps,
        "rows_per_step": recipe.trainer.rows_per_step,
        "sequence_length": recipe.data.sequence_length,
    }
    return TrainingBench(results=rows, settings=settings, notes=notes)


def choose_contenders(recipe: Recipe, dtype: str) -> tuple[list[Contender], list[str]]:
    """Everyone that can run here, on one device, and notes on who cannot."""
    joint = dataclasses.replace(
        recipe,
        dtype="bf16" if dtype == "bf16" else "fp32",
        loss=dataclasses.replace(recipe.loss, ramp_start=0, ramp_steps=0),
        trainer=dataclasses.replace(recipe.trainer, devices=1, num_nodes=1, strategy="auto"),
    )
    full = dataclasses.replace(joint, family={}, sampler=SamplerConfig())
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
    """Rate of a large square product in this dtype, with the threads that training has, in GFLOP/s."""
    device = "cuda" if on_gpu else "cpu"
    a_NN = torch.ones(PRODUCT_SIDE, PRODUCT_SIDE, dtype=DTYPES[dtype], device=device)

    def product() -> None:
        torch.mm(a_NN, a_NN)
        _wait()

    return (
        2e-9 * PRODUCT_SIDE**3 / alternate({"product": product}, budget=1.0, clock=clock).shortest["product"]
    )


def train_briefly(contender: Contender, data: TextData, steps: int, clock: Clock) -> float:
    """Train from new weights for a few steps and then so many; seconds of one of these."""
    torch.manual_seed(contender.recipe.seed)
    model = make_model(contender.recipe, data)
    marks = Marks(clock)
    with _quiet(), tempfile.TemporaryDirectory(prefix="nestling-bench-") as scratch:
        run = _train_ours if contender.engine == "nestling" else _train_theirs
        run(contender.recipe, model, data, WARM_STEPS + steps, marks, Path(scratch))
    assert len(marks.times) == WARM_STEPS + steps, (len(marks.times), steps)
    return (marks.times[-1] - marks.times[WARM_STEPS - 1]) / steps


class Marks:
    """The time at the end of each optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def add(self) -> None:
        """Note the time, once the device has done its work: launches return before."""
        _wait()
        self.times.append(self.clock())


class _MarkSteps(pl.Callback):
    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.marks.add()


def _train_ours(
    recipe: Recipe, model: ElasticLM, data: TextData, steps: int, marks: Marks, scratch: Path
) -> None:
    settings = recipe.trainer
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=1,
        precision="bf16-mixed" if recipe.dtype == "bf16" else "32-true",
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        callbacks=[_MarkSteps(marks)],
        **OUR_OWN,
        default_root_dir=scratch,
    )
    teacher = open_teacher(recipe, recipe.dtype)
    module = JointModule(
        model, recipe.granularities, recipe, teacher=None if teacher is None else teacher.model
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())


def _train_theirs(
    recipe: Recipe, model: ElasticLM, data: TextData, steps: int, marks: Marks, scratch: Path
) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class MarkSteps(TrainerCallback):
        def on_step_end(self, *arguments: Any, **names: Any) -> None:
            marks.add()

    settings, optim = recipe.trainer, recipe.optim
    num_rows = steps * settings.rows_per_step
    tokens_BT, _ = data.train_rows.gather(np.arange(num_rows) % len(data.train_rows))
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate_grad_batches,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        max_grad_norm=settings.gradient_clip_val or 0.0,
        optim="adamw_torch_fused" if optim.fused else "adamw_torch",
        bf16=recipe.dtype == "bf16",
        use_cpu=not torch.cuda.is_available() or settings.accelerator == "cpu",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    # Their model shifts the labels itself.
    examples: Any = [{"input_ids": row_T, "labels": row_T} for row_T in tokens_BT]
    stock = to_hugging_face(model).train()
    trainer = Trainer(model=stock, args=arguments, train_dataset=examples, callbacks=[MarkSteps()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def measure_memory(contender: Contender) -> dict[str, int]:
    """Peak bytes of a fresh process that trains a few steps; see `_peak`."""
    spawn = multiprocessing.get_context("spawn")  # a fork would start with this process's memory
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak, contender, torch.get_num_threads()).result()


def _peak(contender: Contender, threads: int) -> dict[str, int]:
    """Peak memory, and how far it is above what was held before the first training step.

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
    """Resident memory of this process, now or at its peak; where Linux does not tell, at its peak.

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
    """One contender's figures, without comparisons.

    Args:
        contender: who.
        seconds: of one step, in each round.
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


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the screen what both trainers say of their own settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", "transformers", "accelerate"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
