"""The trainings that `nestling bench --train` measures: ours by Lightning, theirs by transformers.Trainer."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from models.base.stopwatch import Clock
from models.checkpoint.huggingface import to_hugging_face
from models.elastic.model import ElasticLM
from train.data.module import TextData
from train.distill.open import open_teacher
from train.recipe.recipe import Recipe
from train.run.fit import OUR_OWN, make_model
from train.run.module import JointModule

WARM_STEPS = 5
"""Warm-up steps, which are not timed: the allocator is still growing."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A training: by which engine, of what, from which recipe."""

    engine: str
    mode: str
    recipe: Recipe


def train_briefly(contender: Contender, data: TextData, steps: int, clock: Clock) -> float:
    """Train new weights, and return the seconds of a step after the warm-up."""
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
        wait_for_device()
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
    if teacher is not None:
        teacher.prepare(data, None)
    module = JointModule(model, recipe.granularities, recipe, teacher=teacher)
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


def wait_for_device() -> None:
    """Wait until the GPU has done its work, if there is one."""
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
