"""Consistency: how close each member is to the full model, and how well it predicts the text.

The full model runs once per batch and serves every member: it is the p of match, KL and alpha, and a
member that is a prefix of its layers is an exit of that very pass. Any granularity can be measured,
trained or not. Alpha, the expected acceptance of one drafted token, is that of speculative sampling
(https://arxiv.org/abs/2211.17192, corollary 3.6).

B batch, T positions, N valid positions, D model, V vocabulary; p the full model, q the member.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.checkpoint.folder import Member
from models.elastic.cache import Recording, SharedPrefix, block_starts
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.perplexity import (
    Batches,
    Progress,
    check_some,
    exact_logits,
    row_chunks,
    select_valid,
    to_perplexity,
)

MEASURES = ("loss", "match", "kl", "alpha")


def evaluate_family(
    model: ElasticLM,
    family: Mapping[str, Granularity],
    batches: Batches,
    *,
    progress: Progress | None = None,
    shared_block: int | None = None,
) -> list[Member]:
    """Measure every member against the text and against the full model.

    Args:
        model: the elastic model.
        family: name -> granularity, trained or not.
        batches: tokens and labels; read once.
        progress: called after each batch.
        shared_block: None runs each member alone; else as a draft in place, see `draft_states`.

    Returns:
        The members in the family's order: parameters of the extraction, loss (nats per token),
        perplexity, match (percent), KL(p, q) (nats per token) and alpha, means over valid positions.

    Raises:
        UsageError: if a granularity does not fit the model.
        NestlingError: if no position has a label.
    """
    views = {name: View(model, granularity) for name, granularity in family.items()}
    means = compare_views(model, views, batches, progress, shared_block=shared_block)
    return [
        Member(
            name=name,
            granularity=str(granularity),
            parameters=count_parameters(model.config, granularity),
            loss=means[name]["loss"],
            perplexity=to_perplexity(means[name]["loss"]),
            match=100 * means[name]["match"],
            kl=means[name]["kl"],
            alpha=means[name]["alpha"],
            owned_bytes=views[name].owned_bytes,
        )
        for name, granularity in family.items()
    ]


def evaluate_shared_alpha(
    model: ElasticLM,
    drafts: Mapping[str, View],
    batches: Batches,
    *,
    block: int = 4,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measure alpha of each draft in place, which reads the full model's keys and values.

    Positions are cut into blocks of `block`, as if each were a round of decoding that drafts as many
    tokens: a position reads the full model's cache before its block and the draft's own within it.

    Args:
        model: the target.
        drafts: drafts by name, views of the target or of packed copies of it.
        batches: tokens and labels; read once.
        block: drafted tokens of a round.
        progress: called after each batch.

    Raises:
        NestlingError: if no position has a label.
    """
    means = compare_views(model, drafts, batches, progress, shared_block=block)
    return {name: means[name]["alpha"] for name in drafts}


def draft_states(
    model: ElasticLM, views: Sequence[View], tokens_BT: Tensor, *, shared_block: int | None
) -> list[Tensor]:
    """Return final residual streams [B, T, D] of the full model, then of each member of it or of a copy.

    A prefix of the model's own layers is an exit of the full model's pass; every other member has a
    pass of its own.

    Args:
        model: the elastic model.
        views: members of it, or of packed copies.
        tokens_BT: token ids.
        shared_block: drafted tokens of a round, within which a member reads its own keys and values and
            before which the full model's; None: its own throughout.
    """
    exits = sorted({len(view.plan.layers) for view in views if _is_exit(view, model)})
    recording = None if shared_block is None else Recording()
    *taken, full_BTD = model.states(tokens_BT, FULL, recording, exits=exits)
    exit_states = dict(zip(exits, taken, strict=True))
    memory = None
    if recording is not None and shared_block is not None:
        starts_T = block_starts(tokens_BT.shape[1], shared_block, 0).to(tokens_BT.device)
        memory = SharedPrefix(recording, starts_T)
    return [full_BTD] + [
        exit_states[len(view.plan.layers)]
        if _is_exit(view, model)
        else view.model.states(tokens_BT, view.granularity, memory)[-1]
        for view in views
    ]


def _is_exit(view: View, model: ElasticLM) -> bool:
    return view.model is model and view.plan.is_layer_prefix


@torch.no_grad()
def compare_views(
    model: ElasticLM,
    views: Mapping[str, View],
    batches: Batches,
    progress: Progress | None = None,
    *,
    shared_block: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return name -> measure (loss, match, KL, alpha) -> mean over valid positions, match as a fraction.

    Args:
        model: the target.
        views: views by name, of the target or of any model with its vocabulary.
        batches: tokens and labels; read once.
        progress: called after each batch.
        shared_block: see `draft_states`; needs views of the target or of copies of it.

    Raises:
        NestlingError: if no position has a label.
    """
    device = model.lm_head.weight.device
    members = list(views.values())
    sums_MQ = torch.zeros(len(members), len(MEASURES), dtype=torch.float64, device=device)
    num_tokens = 0
    for tokens_BT, labels_BT in batches:
        states = draft_states(model, members, tokens_BT.to(device), shared_block=shared_block)
        labels_N, (p_ND, *q_NDs) = select_valid(labels_BT.to(device), states)
        for rows in row_chunks(len(labels_N), model.config.vocab_size):
            log_p_NV = exact_logits(model, p_ND[rows]).log_softmax(-1)
            for sums_Q, view, q_ND in zip(sums_MQ, members, q_NDs, strict=True):
                log_q_NV = exact_logits(view, q_ND[rows]).log_softmax(-1)
                sums_Q += _measures(log_p_NV, log_q_NV, labels_N[rows]).sum(1, dtype=torch.float64)
        num_tokens += len(labels_N)
        if progress:
            progress()
    means_MQ = (sums_MQ / check_some(num_tokens)).tolist()
    return {
        name: dict(zip(MEASURES, means, strict=True)) for name, means in zip(views, means_MQ, strict=True)
    }


def _measures(log_p_NV: Tensor, log_q_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return loss, match, KL and alpha of each position, [4, N]."""
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    # A token that p never gives adds nothing, though its log-ratio may be infinite or undefined.
    ratio_NV = (log_p_NV - log_q_NV).masked_fill_(p_NV == 0, 0.0)
    return torch.stack(
        [
            -log_q_NV.gather(1, labels_N[:, None])[:, 0],
            (log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).to(p_NV.dtype),
            (p_NV * ratio_NV).sum(-1).clamp(min=0.0),  # rounding can leave it a hair below zero
            torch.minimum(p_NV, q_NV).sum(-1).clamp(max=1.0),
        ]
    )
