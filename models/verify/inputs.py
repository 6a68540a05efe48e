"""Inputs of `nestling verify`: drafts by their texts, prompts by their tokens."""

from models.base.errors import NestlingError, UsageError
from models.checkpoint.folder import ModelFolder
from models.decode.engine.draft import ModelDraft
from models.decode.engine.drafters import DRAFTERS
from models.decode.prompts import HEADINGS
from models.decode.tune.resolve import AUTO, is_drafter, open_separate, other_folder
from models.elastic.granularity import Granularity
from models.packed.quantize import split_precision
from models.verify.drafts import ForModel, member, separate

NUM_PROMPTS = 4
"""Prompts to continue where none is given."""


def choose_drafts(folder: ModelFolder, texts: list[str]) -> dict[str, ForModel]:
    """Return the drafts of these texts, else every member of the family but the full one, by name.

    Copied text is tested in any case.

    Raises:
        UsageError: if one is neither a granularity of the model nor a folder, or no draft for it, or cannot
            run in its precision here.
        NestlingError: if a folder cannot be opened.
    """
    config = folder.model.config
    smaller = [name for name, one in folder.family.items() if not one.resolve(config).is_full]
    drafts: dict[str, ForModel] = {}
    for text in [text for text in texts if not is_drafter(folder, text)] or smaller or ["full"]:
        if text in (AUTO, "none") and text not in folder.family:
            remedy = f"name a member, a folder or {', '.join(DRAFTERS)}"
            raise UsageError(f"--draft {text} is no draft to test; {remedy}")
        other = other_folder(folder, text)
        if other is not None:
            path, precision = other
            model = open_separate(folder, path).model
            ModelDraft(model).check(folder.model)
            drafts[text] = separate(model, precision)
            continue
        name, precision = split_precision(text)
        granularity = Granularity.parse(name, folder.family)
        granularity.resolve(config)
        drafts[text] = member(granularity, precision)
    return drafts


def encode(folder: ModelFolder, texts: list[str]) -> list[list[int]]:
    """Return token ids of the prompts; without any, of a few headings, or single tokens without a tokenizer.

    Raises:
        UsageError: if a prompt is empty.
        NestlingError: if there are prompts but no tokenizer.
    """
    config = folder.model.config
    if folder.tokenizer is None:
        if texts:
            raise NestlingError(f"{folder.path} has no tokenizer.json; leave --prompt out")
        return [[token % config.vocab_size] for token in range(NUM_PROMPTS)]
    encoded = [folder.tokenizer.encode(text).ids for text in texts or HEADINGS[:NUM_PROMPTS]]
    for text, ids in zip(texts, encoded, strict=False):
        if not ids:
            raise UsageError(f"--prompt {text!r} has no tokens; give at least one to continue")
    if not texts:  # ours must fit any context
        encoded = [ids[: max(1, config.max_position_embeddings // 2)] for ids in encoded]
    return encoded
