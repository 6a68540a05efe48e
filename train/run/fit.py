"""Train a recipe's family and write it to disk: data, model, callbacks, then Lightning's `Trainer.fit`.

The folder of a run, and which of its states it goes on from, is train/run/run_folder.py.
"""

import contextlib
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from rich.console import Console

from models.base.errors import UsageError
from models.checkpoint.folder import Member, save_model
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.elastic.owning import own
from models.machine.provenance import make_card
from models.measure.consistency import evaluate_family
from train.data.module import TextData
from train.distill.open import open_teacher
from train.distill.written import WrittenRows
from train.objective.teacher import Teacher
from train.recipe.recipe import Recipe
from train.recipe.settings import as_table
from train.run.blend import blend
from train.run.callbacks.checkpoint import Checkpoint
from train.run.callbacks.consistency import Consistency
from train.run.callbacks.gradients import Gradients
from train.run.callbacks.metrics import Metrics
from train.run.callbacks.progress import ProgressBar
from train.run.callbacks.samples import Samples
from train.run.callbacks.signals import Signals
from train.run.callbacks.skip_steps import Stability
from train.run.callbacks.threads import Threads
from train.run.distributed import check_agreed, make_fabric, make_strategy, side_by_side
from train.run.fsdp import gather_model
from train.run.identity import Identity, identify
from train.run.lock import RunLock
from train.run.malloc import keep_freed_memory
from train.run.metrics import MetricsLog
from train.run.module import JointModule
from train.run.run_folder import check_belongs, earlier_state, find_state, open_run
from train.run.speed import full_speed, training_precision
from train.run.start import (
    Start,
    check_start,
    check_taught,
    check_unchanged,
    load_start,
    open_original,
    open_start,
)
from train.run.state import TrainingState
from train.run.tracking import make_loggers

OUR_OWN: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
"""Arguments that switch off the parts of Lightning's Trainer that we replace."""


def fit(recipe: Recipe, out: Path, *, resume: str = "auto", console: Console) -> Path:
    """Train a family, or go on training it.

    Args:
        recipe: The resolved recipe.
        out: The run folder.
        resume: `auto` goes on from the newest good state, `never` starts over, a path names a state.
        console: Shows the progress.

    Returns:
        The model folder, `out/model`.

    Raises:
        UsageError: if the recipe, the run folder or the state do not fit together.
        NestlingError: if data or disk fail, or the run goes astray from every state.
        SystemExit: 130 or 143 after a signal or `max_time`; the state is saved. 0 in every process but the
            first, when the training is over: the first alone writes the model and goes on.
    """
    _quieten()
    keep_freed_memory()
    fabric = make_fabric(recipe.trainer)
    console = console if fabric.is_global_zero else Console(quiet=True)
    if recipe.distill.written_fraction and recipe.trainer.strategy == "fsdp":
        raise UsageError(
            f"distill.written_fraction={recipe.distill.written_fraction:g}: needs the whole model in each "
            "process; set trainer.strategy=auto"
        )
    with Signals(max_seconds=recipe.trainer.max_seconds) as signals, RunLock(out) as lock:
        if fabric.is_global_zero:
            lock.take()
        precision = training_precision(recipe.dtype)
        with console.status("reading models") if check_taught(recipe) else contextlib.nullcontext():
            start = open_start(recipe)
            teacher = open_teacher(recipe, precision, console) or open_original(recipe, start, precision)
        state = find_state(recipe, out, resume, console, teacher) if fabric.is_global_zero else None
        torch.manual_seed(recipe.seed)
        data = TextData(recipe).prepare(console)
        if teacher is not None:
            teacher.prepare(data, console)
        exit_code = None
        with side_by_side(fabric):
            check_agreed(fabric, "dtype=auto", precision)
            check_agreed(fabric, "loss.teacher", str(teacher and dict(teacher.record)))
            state = fabric.broadcast(state)
            check_agreed(fabric, "model.from", str(start and start.sha256))
            run = identify(recipe, data, teacher, precision, start)
            if fabric.is_global_zero and resume != "never":
                check_belongs(recipe, run, out, state, console)
            check_agreed(fabric, "the text's hash", data.tokens_sha256)
            module = make_module(recipe, data, state, teacher)
            if fabric.is_global_zero:
                open_run(recipe, out, state, teacher, run=run, restart=resume == "never", lock=lock)
            returns: list[int] = []
            while module.first_step < recipe.trainer.max_steps:
                exit_code = train(module, data, out, state, run, signals, fabric, console)
                if exit_code is not None or not module.guard.diverged:
                    break
                if fabric.is_global_zero:
                    state = earlier_state(module, data, out / "steps", returns, console)
                state = fabric.broadcast(state)
                module = make_module(recipe, data, state, teacher)
        if exit_code is not None:
            console.print(f"stopped after step {module.step}; the same command goes on from there")
            raise SystemExit(exit_code)
        return finish(module, data, out, console, teacher, start)


def make_cache(recipe: Recipe, console: Console) -> None:
    """Make the cache of a recipe's teacher, and train nothing.

    Raises:
        UsageError: if the recipe names no teacher or cache, or they do not fit together.
        NestlingError: if the teacher or the disk fails; what was made stays.
    """
    if recipe.loss.teacher is None or recipe.distill.cache is None:
        raise UsageError("--cache-only needs a teacher and a cache; give --cache DIR")
    teacher = open_teacher(recipe, training_precision(recipe.dtype), console)
    assert teacher is not None
    teacher.prepare(TextData(recipe).prepare(console), console)


def _quieten() -> None:
    # Lightning 2.6 uses what torch 2.13 deprecates; nothing that a user could mend
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def make_config(recipe: Recipe, data: TextData) -> ElasticConfig:
    """Return the full model's shape: that of `model.from`, else with the vocabulary of teacher or data."""
    start, teacher = check_start(recipe), check_taught(recipe)
    if start is not None:
        return start
    return recipe.elastic_config(teacher.vocab_size if teacher else data.vocab_size, data.eos_token_id)


def make_model(recipe: Recipe, data: TextData) -> ElasticLM:
    """Return the model of `model.from`, or one with seeded initial weights."""
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.model.from_ is not None:
        model = load_start(recipe)
    else:
        model = ElasticLM(make_config(recipe, data))
        model.init_weights(generator)
    own(model, recipe.granularities, recipe.owned.ownership, generator)
    if recipe.model.train == "owned":
        model.requires_grad_(False)
        model.owned.requires_grad_(True)
    return model


def make_module(
    recipe: Recipe, data: TextData, state: TrainingState | None, teacher: Teacher | None
) -> JointModule:
    """Make a new model or a state's, and set the data to that step."""
    model = make_model(recipe, data)
    if state is not None:
        state.restore_weights(model)
        data.first_step, data.first_row = state.step, state.first_row(recipe)
    written = None
    if recipe.distill.written_fraction:
        written = WrittenRows(
            recipe,
            lambda step, micro: data.train_dataloader(divided=False).batch(step, micro),
            training_precision(recipe.dtype),
            state.replay(recipe) if state is not None else None,
            teacher,
        )
    return JointModule(
        model,
        recipe.granularities,
        recipe,
        first_step=state.step if state else 0,
        guard=state.guard if state else None,
        teacher=teacher,
        written=written,
    )


def train(
    module: JointModule,
    data: TextData,
    out: Path,
    state: TrainingState | None,
    run: Identity,
    signals: Signals,
    fabric: Fabric,
    console: Console,
) -> int | None:
    """Run Lightning's Trainer for the steps that remain; the first process then has the full model.

    Returns:
        The exit code, the same in every process, if a signal or `max_time` ended it.
    """
    recipe, settings = module.recipe, module.recipe.trainer
    log = MetricsLog(None)
    if fabric.is_global_zero:
        loggers = make_loggers(recipe.tracking, out, module.members, as_table(recipe))
        log = MetricsLog(out / "metrics.jsonl", loggers, first_step=module.first_step)
    callbacks = [signals, *make_callbacks(module, data, out, log, state, run, console)]
    trainer = pl.Trainer(
        max_steps=settings.max_steps - module.first_step,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(recipe, fabric.world_size),
        precision="bf16-mixed" if training_precision(recipe.dtype) == "bf16" else "32-true",
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        callbacks=callbacks,
        **OUR_OWN,
        default_root_dir=out,
    )
    trainer.fit(module, datamodule=data)
    log.close()
    module.model = gather_model(module.model, wanted=fabric.is_global_zero) or module.model
    return signals.training_ended()


def make_callbacks(
    module: JointModule,
    data: TextData,
    out: Path,
    log: MetricsLog,
    state: TrainingState | None,
    run: Identity,
    console: Console,
) -> list[pl.Callback]:
    """Return everything optional, in the order that it must run in."""
    recipe, settings = module.recipe, module.recipe.trainer
    metrics = Metrics(
        log,
        tokens=state.tokens if state else 0,
        every=settings.log_every_n_steps,
        full_speed=full_speed(recipe, module.model.config),
    )
    batches = data.validation_batches(settings.limit_val_batches)
    every = settings.val_check_interval
    callbacks: list[pl.Callback] = [metrics]
    if batches:
        block = measured_block(recipe)
        callbacks.append(Consistency(log, metrics, module.members, batches, every=every, shared_block=block))
        if recipe.model.train == "joint":  # else members pull at nothing that the full model has
            callbacks.append(Gradients(log, metrics, module.members, batches[0], every=every))
        row_T = batches[0][0][0]
        prompt_ids = row_T[: min(24, 3 * len(row_T) // 4)].tolist()  # a short context needs room to answer
        callbacks.append(Samples(log, module.members, prompt_ids, data.tokenizer, every=every))
    callbacks += [Stability(every=settings.log_every_n_steps), Threads()]
    callbacks.append(ProgressBar(console, metrics, max_steps=settings.max_steps))
    callbacks.append(
        Checkpoint(
            out / "steps",
            metrics,
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            row_at=data.row_at,
            run=asdict(run),
            state=state,
        )
    )
    return callbacks


def finish(
    module: JointModule,
    data: TextData,
    out: Path,
    console: Console,
    teacher: Teacher | None,
    start: Start | None = None,
) -> Path:
    """Measure the family once more on more text and write the model folder."""
    if start is not None and module.recipe.model.train == "owned":
        check_unchanged(module.model, start)
    members: list[Member] = []
    trainer = module.recipe.trainer
    batches = data.validation_batches(trainer.limit_final_batches)
    fraction = blend(module.model, module.recipe, batches[: trainer.limit_val_batches], console)
    if batches:
        if not console.is_terminal:
            console.print("measuring the family")
        with console.status("measuring the family"):
            block = measured_block(module.recipe)
            members = evaluate_family(module.model, module.members, batches, shared_block=block)
    return save_model(
        out / "model",
        module.model,
        tokenizer=start.tokenizer if start else data.tokenizer,
        family=module.members,
        members=members,
        provenance=make_provenance(module, data, teacher, start) | {"blend": fraction},
        chat_template=start.chat_template if start else data.chat.template if data.chat else None,
        like=Path(start.path).expanduser() if start else None,
    )


def measured_block(recipe: Recipe) -> int | None:
    """Return the block of members that are measured as they draft, which train on the shared cache alone."""
    return recipe.sampler.block if recipe.sampler.shared_cache == 1 else None


def make_provenance(
    module: JointModule, data: TextData, teacher: Teacher | None, start: Start | None = None
) -> dict[str, Any]:
    """Return the origin of a model: recipe, data, teacher, commit, versions, machine."""
    return {
        "recipe": as_table(module.recipe),
        "steps": max(module.step, module.first_step),
        "skipped_steps": module.guard.skipped,
        "rollbacks": module.guard.rollbacks,
        "data": data.provenance,
        "start": None if start is None else start.record,
        "teacher": None if teacher is None else dict(teacher.record),
        "card": make_card(dtypes={"training": training_precision(module.recipe.dtype)}),
    }
