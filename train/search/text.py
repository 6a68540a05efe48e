"""The text that a search measures on: beginnings of documents, continued by the model itself."""

from collections.abc import Sequence

import torch

from models.base.errors import NestlingError
from models.checkpoint.folder import ModelFolder
from models.decode.sampling.params import SamplingParams
from train.data.loader import take_batches
from train.data.pack import document_starts
from train.data.tokens import load_rows_for
from train.search.measure import Progress, Text, continue_text

NUM_PROMPT, NUM_NEW = 32, 96
"""Tokens of a row of text: the prompt, and what the target writes."""


def open_text(
    folder: ModelFolder,
    data: str,
    samplings: Sequence[SamplingParams],
    *,
    text_field: str | None = None,
    num_tokens: int,
    num_prompts: int,
    progress: Progress,
) -> Text:
    """Let the model continue the beginnings of a fair sample of the documents, under each temperature.

    Most who decode begin where a document does, as `nestling bench` does: within one, drafts do better or
    worse. Where there are too few documents, prompts come from within.

    Args:
        folder: the model and its tokenizer.
        data: the source of the text.
        samplings: settings of sampling.
        text_field: field that holds the text; None is the one that the model was trained on.
        num_tokens: tokens for the model to write, at least.
        num_prompts: number of rows, at least.
        progress: called before each part.

    Raises:
        NestlingError: if the text is shorter than a prompt.
    """
    config = folder.model.config
    num_prompt = min(NUM_PROMPT, config.max_position_embeddings // 4)
    num_new = min(NUM_NEW, config.max_position_embeddings - num_prompt)
    progress("reading the text", 0, 1)
    rows = load_rows_for(folder, data, longest=num_prompt, text_field=text_field)
    counts_V = torch.bincount(torch.from_numpy(rows.stream.astype("int64")), minlength=config.vocab_size)
    num_rows = max(num_prompts, -(-num_tokens // num_new))
    prompts_RP = torch.from_numpy(document_starts(rows.stream, num_prompt, num_rows))
    if len(prompts_RP) < num_rows:
        batches = take_batches(rows, num_rows * num_prompt)
        inside_RP = torch.cat([tokens_BT[(labels_BT >= 0).all(1)] for tokens_BT, labels_BT in batches])
        prompts_RP = torch.cat([prompts_RP, inside_RP])[:num_rows]
    if not len(prompts_RP):
        raise NestlingError(f"--data {data} has fewer than {num_prompt} tokens: give a longer text")
    progress("continuing the text", 0, 1)
    return continue_text(folder.model, prompts_RP, num_new, samplings, counts_V)
