"""Acceptance: how many drafted tokens each verifier keeps, on text that the target writes itself.

Alpha alone does not tell: hard positions come together, a verifier may keep a token for the sake of its
neighbours, and decoding meets its own text and not that of a corpus. So the target continues prompts
under the distribution in question, and each draft is compared with it on these very tokens x. Given the text,
the chance that a round which starts at some position has its first k drafted tokens kept is

    token     prod min(1, q/p)(x_i)              (https://arxiv.org/abs/2211.17192)
    block     min over j <= k of prod (q/p)(x_i)   (https://arxiv.org/abs/2403.10444: its E q r, seen from x)
    coupled   prod 1 / sum_v max(p_v, q_v p(x_i)/q(x_i))    (https://arxiv.org/abs/2408.07978)
    greedy    1 while the draft's likeliest token is x_i

and a round ends where its first token is not kept, which says where the next one starts.

R rows, P prompt tokens, T tokens of a row, N = T - P new ones, K the longest round, V vocabulary;
p target, q draft.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.decode.engine.trimmed_head import TrimmedHead
from models.decode.sampling.params import SamplingParams, sampling_probs
from models.decode.sampling.samplers import COUPLED
from models.elastic.cache import KVCache
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.consistency import draft_states
from models.measure.perplexity import row_chunks

Floats: TypeAlias = NDArray[np.float64]
BATCH_TOKENS = 4096
TINY = 1e-30
LARGEST_RATIO = 1e6  # products of a round's must stay finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Acceptance:
    """A draft's probabilities at each token that the target wrote, [R, N] in reading order."""

    overlap_RN: Floats
    """sum over v of min(p, q): the chance that one drafted token is kept."""
    ratio_RN: Floats
    """q/p of the token. Greedy: 1 where the draft's likeliest token is this one, else 0."""
    coupled_RN: Floats
    """The chance that the draft takes the token too, if both see the same noise."""

    @property
    def alpha(self) -> float:
        """Expected acceptance of one drafted token; greedy: the fraction of equal tokens."""
        return float(self.overlap_RN.mean())

    def tokens_per_round(self, verifier: str, gammas: Sequence[int]) -> dict[int, float]:
        """Return gamma -> tokens that a round gives if it drafts gamma, the target's own one included.

        Rounds that could reach beyond the last token are left out.
        """
        longest = max(gammas)
        kept_RNK = self._kept(verifier, longest)
        return {gamma: _mean_round(kept_RNK[:, :, : gamma + 1]) for gamma in gammas}

    def _kept(self, verifier: str, longest: int) -> Floats:
        """Return the chance that a round from each start keeps its first k = 0 .. longest: [R, N, K+1]."""
        if verifier == COUPLED:
            one_RN = self.coupled_RN
        else:
            one_RN = self.ratio_RN if verifier == "block" else np.minimum(self.ratio_RN, 1.0)
        num_rows, num_tokens = one_RN.shape
        padded_RN = np.concatenate([one_RN, np.zeros((num_rows, longest))], axis=1)
        windows_RNK = np.lib.stride_tricks.sliding_window_view(padded_RN, longest, axis=1)[:, :num_tokens]
        product_RNK = np.cumprod(windows_RNK, axis=-1)
        first_RN1 = np.ones((num_rows, num_tokens, 1))
        kept_RNK = np.concatenate([first_RN1, product_RNK], axis=-1)
        return np.minimum.accumulate(kept_RNK, axis=-1)


def _mean_round(kept_RNK: Floats) -> float:
    """Return the tokens per round, by following every way that rounds can take through the text.

    >>> _mean_round(np.array([[[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]]))
    2.0
    >>> _mean_round(np.array([[[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]]]))
    1.5
    """
    num_rows, num_tokens, width = kept_RNK.shape
    next_RNK = kept_RNK.copy()  # the chance of exactly k kept tokens
    next_RNK[..., :-1] -= kept_RNK[..., 1:]
    starts_RN = np.zeros((num_rows, num_tokens + width))
    starts_RN[:, 0] = 1.0
    last = max(1, num_tokens - width + 1)
    for start in range(last):
        reached_RK = starts_RN[:, start, None] * next_RNK[:, start]
        starts_RN[:, start + 1 : start + 1 + width] += reached_RK
    weight_RN = starts_RN[:, :last]
    return float((weight_RN * kept_RNK[:, :last].sum(-1)).sum() / weight_RN.sum())


@torch.inference_mode()
def continue_rows(
    model: ElasticLM, prompts_RP: Tensor, num_tokens: int, params: SamplingParams, *, seed: int = 0
) -> Tensor:
    """Return the prompts, each continued by `num_tokens` tokens of plain sampling: [R, T].

    A row is independent of its companions, and an end of text does not end it.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens_RT = prompts_RP
    cache = KVCache(
        model.config,
        batch_size=len(prompts_RP),
        num_positions=prompts_RP.shape[1] + num_tokens,
        dtype=model.cache_dtype,
        device=model.device,
    )
    for _ in range(num_tokens):
        new_RT = tokens_RT[:, cache.length :]
        logits_RV = model(new_RT.to(model.device), memory=cache, num_last=1)[:, -1]
        cache.commit(new_RT.shape[1])
        probs_RV = sampling_probs(logits_RV, params).cpu()
        next_R1 = torch.multinomial(probs_RV, 1, generator=generator)
        tokens_RT = torch.cat([tokens_RT, next_R1], dim=1)
    return tokens_RT


@torch.inference_mode()
def measure_acceptance(
    target: ElasticLM,
    drafts: Mapping[str, View | TrimmedHead],
    tokens_RT: Tensor,
    params: SamplingParams,
    *,
    num_prompt: int,
    block: int = 4,
    progress: Callable[[], object] | None = None,
) -> dict[str, Acceptance]:
    """Compare drafts in place with their target on its own text.

    Args:
        target: the model that wrote it.
        drafts: drafts by name; views of the target or of packed copies of it, for all tokens or a few.
        tokens_RT: of `continue_rows`, under the same distribution.
        params: settings of sampling.
        num_prompt: P, tokens of each row that the target did not write.
        block: drafted tokens of a round, as far as it matters to what a draft reads; see
            `evaluate_shared_alpha`.
        progress: called after each batch of rows.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in drafts}
    for rows_RT in tokens_RT.split(max(1, BATCH_TOKENS // tokens_RT.shape[1])):
        for name, values_3N in _compare(target, drafts, rows_RT, params, num_prompt, block):
            found[name].append(values_3N)
        if progress:
            progress()
    shape = (3, len(tokens_RT), tokens_RT.shape[1] - num_prompt)
    joined = {name: torch.cat(parts, dim=1).reshape(shape).numpy() for name, parts in found.items()}
    return {
        name: Acceptance(overlap_RN=overlap_RN, ratio_RN=ratio_RN, coupled_RN=coupled_RN)
        for name, (overlap_RN, ratio_RN, coupled_RN) in joined.items()
    }


def _compare(
    target: ElasticLM,
    drafts: Mapping[str, View | TrimmedHead],
    rows_RT: Tensor,
    params: SamplingParams,
    num_prompt: int,
    block: int,
) -> Iterator[tuple[str, Tensor]]:
    """Yield each draft's three values at the new tokens of some rows, chunk by chunk: [3, N]."""
    # Drafts that differ in their vocabulary alone share a pass.
    views = {_member(draft): View(draft.full, draft.granularity) for draft in drafts.values()}
    device = target.device
    states = draft_states(target, list(views.values()), rows_RT[:, :-1].to(device), shared_block=block)
    p_ND, *q_NDs = (x_RTD[:, num_prompt - 1 :].flatten(0, 1) for x_RTD in states)
    by_view = dict(zip(views, q_NDs, strict=True))
    chosen_N1 = rows_RT[:, num_prompt:].reshape(-1, 1).to(device)
    for rows in row_chunks(len(chosen_N1), target.config.vocab_size):
        p_NV = sampling_probs(target.head(p_ND[rows]), params)
        for name, draft in drafts.items():
            x_ND = by_view[_member(draft)][rows]
            q_NV = sampling_probs(draft.head(x_ND), params)
            yield name, _values(p_NV, q_NV, chosen_N1[rows], is_greedy=params.is_greedy)


def _values(p_NV: Tensor, q_NV: Tensor, chosen_N1: Tensor, *, is_greedy: bool) -> Tensor:
    """Return overlap, ratio and coupled chance of each position, [3, N] in float64."""
    q_N = q_NV.gather(1, chosen_N1)[:, 0]
    if is_greedy:  # the text is the target's choice, whatever rounding makes of it in this pass
        return torch.stack([q_N, q_N, q_N]).double().cpu()
    p_N = p_NV.gather(1, chosen_N1)[:, 0].clamp_min(TINY)
    larger_N = torch.maximum(p_NV * q_N[:, None], q_NV * p_N[:, None]).sum(-1)
    overlap_N = torch.minimum(p_NV, q_NV).sum(-1).clamp_max(1.0)
    ratio_N = (q_N / p_N).clamp_max(LARGEST_RATIO)
    coupled_N = (q_N / larger_N.clamp_min(TINY)).clamp_max(1.0)
    return torch.stack([overlap_N, ratio_N, coupled_N]).double().cpu()


def _member(draft: View | TrimmedHead) -> tuple[int, Granularity]:
    return id(draft.full), draft.granularity
