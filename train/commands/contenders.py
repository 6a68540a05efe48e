"""What `nestling bench` compares: the model in each dtype, prompts, and the cells of its table."""

from collections.abc import Sequence
from pathlib import Path

import torch

from models.bench.matrix import Cell, DraftChoice, Target, make_cells
from models.bench.prompts import HEADINGS, beginnings, check_room, encode_prompts, read_prompts
from models.checkpoint import ModelFolder
from models.decode.lookup import LookupDraft
from models.decode.sampling import SamplingParams
from models.errors import NestlingError
from models.quantize import INT8
from train.commands.common import open_for_decoding
from train.commands.drafting import DEFAULT_VERIFIER, choose_drafting
from train.data.corpus import open_corpus


def open_targets(model: Path, dtypes: Sequence[str], scratch: Path) -> list[Target]:
    """The model in each dtype, once, with the threads that the machine card advises for it.

    Raises:
        UsageError: for a dtype that is none, or if there is no model.
        NestlingError: if the folder has no tokenizer or cannot be opened.
    """
    targets: dict[str, Target] = {}
    for asked in dict.fromkeys(dtypes):
        folder, name = open_for_decoding(model, asked)
        if folder.tokenizer is None:
            raise NestlingError(f"{model} has no tokenizer.json; put the one it was trained with there")
        if name not in targets:
            threads = torch.get_num_threads()
            targets[name] = Target(folder, dtype=name, num_threads=threads, scratch=scratch)
    return list(targets.values())


def open_prompts(
    folder: ModelFolder, prompts: Path | None, data: str | None, num_prompts: int, max_new_tokens: int
) -> list[list[int]]:
    """Token ids of the prompts: of the file `prompts`, of documents of `data`, or of our own headings.

    Raises:
        UsageError: if `data` is not there, or a continuation does not fit into the model's context.
        NestlingError: if a file holds no prompt.
    """
    assert folder.tokenizer is not None
    if data:
        ids = beginnings(open_corpus(data, key="--data").documents(), folder.tokenizer, num_prompts)
    else:
        texts = read_prompts(prompts, num_prompts) if prompts else HEADINGS[:num_prompts]
        ids = encode_prompts(texts, folder.tokenizer)
    context = folder.model.config.max_position_embeddings
    check_room(ids, max_new_tokens=max_new_tokens, context=context)
    return ids


def choose_cells(
    targets: Sequence[Target], laws: Sequence[SamplingParams], drafts: Sequence[str], gamma: int | None
) -> tuple[list[Cell], list[str]]:
    """All that runs, and notes on what was chosen or left out.

    Raises:
        UsageError: if a draft is none, or does not fit the model.
    """
    cells: list[Cell] = []
    notes: list[str] = []
    for target in targets:
        torch.set_num_threads(target.num_threads)  # the choice of a draft is timed
        for params in laws:
            chosen = _drafts(target, params, drafts, gamma, notes)
            cells += make_cells(target, params, chosen)
            if target.dtype == INT8:
                notes.append("int8 is a model of its own: transformers, which would run another, is left out")
                continue
            notes += [
                f"{choice.name} has unequal layers, which no stock model holds: transformers has no assistant"
                for choice in chosen
                if target.assistant(choice) is None and not isinstance(choice.draft, LookupDraft)
            ]
    return cells, list(dict.fromkeys(notes))


def _drafts(
    target: Target, params: SamplingParams, asked: Sequence[str], gamma: int | None, notes: list[str]
) -> list[DraftChoice]:
    chosen = []
    for text in dict.fromkeys(asked):
        drafting = choose_drafting(
            target.folder, text, gamma, params, dtype=target.dtype, verifier=DEFAULT_VERIFIER
        )
        if drafting.note:
            about = f"--draft {text} ({target.dtype}, T={params.temperature:g})"
            notes.append(f"{about} is {drafting.name}: {drafting.note}")
        if drafting.draft is not None:
            chosen.append(DraftChoice(name=drafting.name, draft=drafting.draft, gamma=drafting.gamma))
    return chosen
