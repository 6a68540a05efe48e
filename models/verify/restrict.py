"""A model over a few of its tokens: every weight is its own but the rows of the embedding and of the head."""

import dataclasses
from collections.abc import Sequence

import torch

from models.checkpoint.weights import EMBEDDING, HEAD, model_from, weights_of
from models.elastic.model import ElasticLM
from models.elastic.owning import copy_owned


def likeliest_tokens(model: ElasticLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[int]:
    """Return the `num_tokens` tokens that are likeliest after the prompts, on average, likeliest first."""
    device = model.device
    with torch.inference_mode():
        ends = [model(torch.tensor([list(ids)], device=device), num_last=1)[0, -1] for ids in prompts]
        mean_V = torch.stack([logits_V.float().softmax(-1) for logits_V in ends]).mean(0)
        tokens: list[int] = mean_V.topk(num_tokens).indices.tolist()
    return tokens


def restrict(
    model: ElasticLM,
    token_ids: Sequence[int],
    dtype: torch.dtype | None = None,
    *,
    shared: bool = False,
) -> ElasticLM:
    """Return a copy whose token i is the model's `token_ids[i]`; other tokens have no chance.

    No token ends its texts. A packed model gives a plain one, of the weights that it was packed from.

    Args:
        model: any elastic model.
        token_ids: of the model, each once.
        dtype: of the copy; None keeps the embedding's.
        shared: whether all but the embedding and the head is the model's own memory.
    """
    config = dataclasses.replace(
        model.config, vocab_size=len(token_ids), bos_token_id=None, eos_token_id=None
    )
    rows = torch.tensor(list(token_ids), device=model.device)
    tensors = {
        name: tensor[rows] if name in {EMBEDDING, HEAD} else tensor
        for name, tensor in weights_of(model).items()
    }
    copy = model_from(config, tensors, dtype=dtype, mapped=shared)
    copy.is_mapped = False  # of no file, whose pages could be read again
    return copy_owned(model, copy).eval()
