"""Contenders of `nestling bench`: a model in each dtype, or a random one; prompts; the cells of its table."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from models.base.errors import NestlingError, UsageError
from models.base.processor import busy_now, free_memory_bytes
from models.bench import llama
from models.bench.contenders import Cell, Target, make_cells
from models.bench.random_models import (
    SHAPES,
    RandomModel,
    check_exit,
    check_memory,
    random_model,
    random_prompts,
)
from models.checkpoint.folder import ModelFolder, save_model
from models.decode.engine.drafters import DRAFTERS
from models.decode.open import open_for_decoding
from models.decode.prompts import (
    HEADINGS,
    PROMPT_TOKENS,
    Prompt,
    beginnings,
    check_room,
    encode_prompts,
    read_prompts,
)
from models.decode.sampling.params import SamplingParams
from models.decode.tune.resolve import (
    AUTO,
    DEFAULT_GAMMA,
    DEFAULT_VERIFIER,
    Drafting,
    choose_drafting,
)
from models.elastic.count import count_parameters
from models.elastic.granularity import Granularity
from models.machine.card import machine_card, resolve_dtype
from models.packed.quantize import FILE, INT8, split_precision
from train.data.corpus import as_trained, open_corpus

DEFAULT_EXIT = "layers=0-1"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The user's settings, whatever the model."""

    drafts: Sequence[str]
    gamma: int | Literal["auto"] | None
    num_prompts: int
    max_new_tokens: int
    samplings: Sequence[SamplingParams]
    dtypes: Sequence[str]
    compiled: bool
    engines: Collection[str]
    """Engines beside ours."""
    scratch: Path = Path()
    """A folder for extractions."""
    text_field: str | None = None
    """The field of `data` that holds the text; None is the one that the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All that is prepared before the clock starts."""

    targets: Sequence[Target]
    prompt_ids: Sequence[Sequence[int]]
    cells: Sequence[Cell]
    notes: list[str]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the results that say what was decoded."""


def folder_contest(model: Path, options: BenchSettings, *, prompts: Path | None, data: str | None) -> Contest:
    """Open a model folder in each dtype, over prompts from the file `prompts`, from `data`, or our own.

    Raises:
        UsageError: for an unknown dtype or draft, if there is no model or no `data`, or if a
            continuation does not fit into the context.
        NestlingError: if the folder has no tokenizer or cannot be opened, or a file holds no prompt.
    """
    targets = _open_targets(model, options)
    prompt_ids = _open_prompts(targets[0].folder, prompts, data, options)
    about = {"model": str(model), "prompts": str(prompts or data or "headings"), "random": None}
    return _contest(targets, prompt_ids, options, about)


def random_contest(
    size: str, alpha: float, options: BenchSettings, *, progress: Callable[[], None] | None = None
) -> Contest:
    """Return a random model of a published shape, whose exit drafts with acceptance `alpha`.

    Raises:
        UsageError: if there is no such shape, the draft is no exit, memory is short, or more than one
            dtype, temperature or draft is given.
    """
    config = SHAPES.get(size)
    if config is None:
        raise UsageError(f"--random {size} is not a size; choose from {', '.join(SHAPES)}")
    dtype: str = _only("--dtype", options.dtypes)
    params: SamplingParams = _only("--temperature", options.samplings)
    exit_ = Granularity.parse(split_precision(_only("--draft", options.drafts))[0], {})
    check_exit(config, exit_)
    stored = "fp32" if dtype in (INT8, FILE) else resolve_dtype(dtype, machine_card(), purpose="decoding")
    check_memory(size, stored, free_memory_bytes())
    made = random_model(config, exit_, alpha=alpha, params=params, progress=progress)
    about = {"model": f"random {size}", "prompts": "random tokens", "random": _describe(size, alpha, made)}
    path = save_model(options.scratch / f"random-{size}", made.model, family={})
    measured = made.alpha
    del made  # opened again as any folder is, in its dtype
    target = _target(*open_for_decoding(path, dtype), options)
    prompt_ids = random_prompts(config, num_prompts=options.num_prompts, num_tokens=PROMPT_TOKENS)
    check_room(prompt_ids, max_new_tokens=options.max_new_tokens, context=config.max_position_embeddings)
    contest = _contest([target], prompt_ids, options, about)
    note = (
        f"the weights are random, of the shape {size}, scaled so that {measured:.3f} of the "
        "drafted tokens are expected to stay: this is about speed at that size, not about a trained model"
    )
    return dataclasses.replace(contest, notes=[note, *contest.notes])


def _only(flag: str, values: Sequence[Any]) -> Any:
    if len(values) != 1:
        raise UsageError(f"--random takes one {flag}, got {len(values)}; the weights are made for it")
    return values[0]


def _describe(size: str, alpha: float, made: RandomModel) -> dict[str, Any]:
    parameters = count_parameters(made.model.config)
    measured = {"alpha": made.alpha, "factor": made.factor}
    return {"size": size, "parameters": parameters, "alpha_asked": alpha, **measured}


def _contest(
    targets: Sequence[Target],
    prompt_ids: Sequence[Sequence[int]],
    options: BenchSettings,
    about: Mapping[str, Any],
) -> Contest:
    cells: list[Cell] = []
    notes: list[str] = []
    num_positions = max(map(len, prompt_ids)) + options.max_new_tokens
    for target in targets:
        torch.set_num_threads(target.num_threads)  # the choice of a draft is timed
        for params in options.samplings:
            chosen = _drafts(target, params, options, notes)
            cells += make_cells(
                target,
                params,
                chosen,
                num_positions=num_positions,
                compiled=options.compiled,
                engines=options.engines,
            )
            if "llama.cpp" in options.engines and not target.runs_in_llama:
                notes.append(llama.MISSING)
            if "transformers" not in options.engines:
                continue
            if target.dtype in (INT8, FILE):
                theirs = "is its Q8_0" if target.dtype == INT8 else "reads the same file"
                notes.append(
                    f"{target.dtype} is a model of its own: transformers, which would run another, is left "
                    f"out; that of llama.cpp {theirs}"
                )
                continue
            notes += [
                f"{choice.name} has unequal layers, which no stock model holds: transformers has no assistant"
                for choice in chosen
                if target.assistant(choice) is None and choice.name not in DRAFTERS
            ]
    return Contest(
        targets=targets,
        prompt_ids=prompt_ids,
        cells=cells,
        notes=list(dict.fromkeys(notes)),
        about=about,
    )


def _open_targets(model: Path, options: BenchSettings) -> list[Target]:
    """Return the model in each dtype, once, with the threads that `nestling generate` would take for it."""
    targets: dict[str, Target] = {}
    for setting in dict.fromkeys(options.dtypes):
        folder, name = open_for_decoding(model, setting)
        if folder.tokenizer is None:
            raise NestlingError(f"{model} has no tokenizer.json; put the one it was trained with there")
        if name not in targets:
            targets[name] = _target(folder, name, options)
    return list(targets.values())


def _target(folder: ModelFolder, dtype: str, options: BenchSettings) -> Target:
    return Target(
        folder,
        dtype=dtype,
        num_threads=torch.get_num_threads(),
        # Threads wait for each other where others are busy: nothing can be told then, and all take as many.
        most_threads=torch.get_num_threads() if busy_now() else machine_card().cores,
        scratch=options.scratch,
    )


def _open_prompts(
    folder: ModelFolder, prompts: Path | None, data: str | None, options: BenchSettings
) -> list[list[int]]:
    assert folder.tokenizer is not None
    num_prompts = options.num_prompts
    names: list[str] | None
    if data:
        corpus = open_corpus(data, key="--data", **as_trained(folder.provenance, options.text_field))
        ids, names = beginnings(corpus.documents(), folder.tokenizer, num_prompts), None
    else:
        own = [Prompt(text, f"prompt {number}") for number, text in enumerate(HEADINGS[:num_prompts], 1)]
        texts = read_prompts(prompts, num_prompts) if prompts else own
        ids = encode_prompts(texts, folder.tokenizer)
        names = [prompt.where for prompt in texts]
    context = folder.model.config.max_position_embeddings
    check_room(ids, max_new_tokens=options.max_new_tokens, context=context, names=names)
    return ids


def _drafts(
    target: Target, params: SamplingParams, options: BenchSettings, notes: list[str]
) -> list[Drafting]:
    chosen = []
    adapts = options.gamma == AUTO
    number = options.gamma if isinstance(options.gamma, int) else None
    for text in dict.fromkeys(options.drafts):
        drafting = choose_drafting(
            target.folder, text, number, params, dtype=target.dtype, verifier=DEFAULT_VERIFIER
        )
        copies = adapts and text == AUTO  # as in `nestling generate`
        if drafting.note:
            about = f"--draft {text} ({target.dtype}, T={params.temperature:g})"
            or_copies = f" or {', '.join(DRAFTERS)}"
            notes.append(f"{about} is {drafting.name}{or_copies * copies}: {drafting.note}")
        if drafting.draft is None and copies:  # one row, whose controller tries what needs no model
            drafting = dataclasses.replace(drafting, name=next(iter(DRAFTERS)), gamma=DEFAULT_GAMMA)
        if drafting.draft is not None or copies:
            chosen.append(dataclasses.replace(drafting, adapts=adapts, copies=copies))
    return chosen
