"""The forms in which a cache keeps what a teacher says about a position.

    topk      ids and log-probabilities of the k most likely tokens, log-probability of all others together
    samples   ids of k draws, how often each came, and its log-probability
    all       every logit, in the teacher's dtype: a run from it equals one beside the teacher, bit for bit

A log-probability takes two bytes: whole steps of 2**-11 from 0 to -32, so that a probability is off by at
most a 4,000th of itself. An id takes two bytes, or four in a vocabulary above 65,536.

N positions, V vocabulary, K tokens of a position, B = K + 1 buckets.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.base.dtypes import DTYPES
from models.base.errors import UsageError
from train.data.stream import stream_dtype
from train.objective.buckets import SAMPLED, bucket_divergence, log_sum, sampled_divergence
from train.objective.losses import divergence
from train.recipe.recipe import Recipe
from train.recipe.sections import LossConfig

PIECE = 8
"""Rows whose probabilities are made at once on a CPU, which its caches hold."""

Records = NDArray[Any]
"""A structured array [N]: one record for each position."""

STEP = 2.0**-11
BLOCK = 128
"""Tokens of a block whose largest logit is found first: the k largest lie in the k blocks of the largest."""


class Form(Protocol):
    """A way to keep a teacher's distribution at a position."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The record of a position."""
        ...

    def encode(self, logits_NV: Tensor, uniform_N: NDArray[np.float64]) -> Records:
        """Return the records of a teacher's logits.

        Args:
            logits_NV: the teacher's.
            uniform_N: a random number below 1 for each position.
        """
        ...

    def divergence(self, records: Records, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """Return the divergence [N] of a student's logits from the teacher of the records."""
        ...


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k most likely tokens, and all others as one bucket."""

    k: int
    vocab_size: int
    temperature: float = 1.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Form`."""
        return np.dtype(
            [("ids", stream_dtype(self.vocab_size), (self.k,)), ("logs", np.uint16, (self.k + 1,))]
        )

    def encode(self, logits_NV: Tensor, uniform_N: NDArray[np.float64]) -> Records:
        """See `Form`."""
        logits_NV = _tempered(logits_NV, self.temperature)
        values_NK, ids_NK = largest(logits_NV, self.k)
        log_p_NK = values_NK.float() - log_sum(logits_NV, ids_NK[:, 0].contiguous()).float().unsqueeze(1)
        return self.pack(ids_NK, log_p_NK)

    def pack(self, ids_NK: Tensor, log_p_NK: Tensor) -> Records:
        """Return the records of k tokens and their log-probabilities."""
        rest_N1 = 1 - log_p_NK.double().exp().sum(-1, keepdim=True)
        log_p_NB = torch.cat([log_p_NK.double(), rest_N1.clamp_min(1e-30).log()], -1)
        records = np.zeros(len(ids_NK), self.dtype)
        records["ids"] = ids_NK.cpu().numpy()
        records["logs"] = to_codes(log_p_NB)
        return records

    def divergence(self, records: Records, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """See `Form`."""
        ids_NK = _ids(records, logits_NV.device)
        log_p_NB = from_codes(records["logs"], logits_NV.device)
        return bucket_divergence(log_p_NB, ids_NK, logits_NV, config, self.temperature)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The tokens of k draws, with their counts.

    The draws are systematic: the points (u + i) / k of the cumulated probabilities for one random u, so that
    a token of probability p comes k p times in the mean, and never more than one beside that.
    """

    k: int
    vocab_size: int
    temperature: float = 1.0

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Form`."""
        ids = ("ids", stream_dtype(self.vocab_size), (self.k,))
        return np.dtype([ids, ("counts", np.uint8, (self.k,)), ("logs", np.uint16, (self.k,))])

    def encode(self, logits_NV: Tensor, uniform_N: NDArray[np.float64]) -> Records:
        """See `Form`."""
        logits_NV = _tempered(logits_NV, self.temperature)
        log_sum_N1 = log_sum(logits_NV, logits_NV.argmax(-1)).float().unsqueeze(1)
        points_NK = (torch.from_numpy(uniform_N).unsqueeze(1) + torch.arange(self.k)) / self.k
        points_NK = points_NK.to(logits_NV.device)
        rows = PIECE if logits_NV.device.type == "cpu" else len(logits_NV)
        pieces = zip(logits_NV.split(rows), log_sum_N1.split(rows), points_NK.split(rows), strict=True)
        ids_NK = torch.cat([draw((x.float() - total).exp_(), points) for x, total, points in pieces])
        # Points rise, so that draws of one token stand side by side: the first of them keeps their number.
        first_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        first_NK[:, 1:] = ids_NK[:, 1:] != ids_NK[:, :-1]
        same_NKK = ids_NK.unsqueeze(2) == ids_NK.unsqueeze(1)
        records = np.zeros(len(ids_NK), self.dtype)
        records["ids"] = ids_NK.cpu().numpy()
        records["counts"] = (same_NKK.sum(-1) * first_NK).cpu().numpy()
        records["logs"] = to_codes(logits_NV.gather(1, ids_NK).float() - log_sum_N1)
        return records

    def divergence(self, records: Records, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """See `Form`."""
        device = logits_NV.device
        weights_NK = torch.from_numpy(records["counts"].astype(np.float32) / self.k).to(device)
        log_p_NK, ids_NK = from_codes(records["logs"], device), _ids(records, device)
        return sampled_divergence(log_p_NK, weights_NK, ids_NK, logits_NV, config, self.temperature)


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Every logit."""

    vocab_size: int
    weights: str = "fp32"

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Form`; NumPy has no bf16, whose bits are kept."""
        return np.dtype([("logits", np.uint16 if self.weights == "bf16" else np.float32, (self.vocab_size,))])

    def encode(self, logits_NV: Tensor, uniform_N: NDArray[np.float64]) -> Records:
        """See `Form`."""
        logits_NV = logits_NV.to(DTYPES[self.weights]).cpu()
        bits_NV = logits_NV.view(torch.uint16) if self.weights == "bf16" else logits_NV
        records = np.zeros(len(logits_NV), self.dtype)
        records["logits"] = bits_NV.numpy()
        return records

    def divergence(self, records: Records, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """See `Form`."""
        target_NV = torch.from_numpy(np.ascontiguousarray(records["logits"]))
        if self.weights == "bf16":
            target_NV = target_NV.view(torch.bfloat16)
        return divergence(target_NV.to(logits_NV.device), logits_NV, config)


def make_form(recipe: Recipe, vocab_size: int, weights: str) -> Form:
    """Return the form that a recipe asks for.

    Args:
        recipe: its `distill` and `loss`.
        vocab_size: width of the teacher's logits.
        weights: the teacher's dtype, `fp32` or `bf16`.

    Raises:
        UsageError: if its divergence cannot be had without bias from such a form, or k is too large.
    """
    config, temperature = recipe.distill, recipe.loss.temperature
    if config.form == "all":
        return Everything(vocab_size=vocab_size, weights=weights)
    if config.form == "samples":
        if recipe.loss.divergence not in SAMPLED:
            raise UsageError(
                f"distill.form=samples: loss.divergence={recipe.loss.divergence} is no expectation over "
                f"the teacher's tokens, and samples would bias it; choose {', '.join(SAMPLED)}, or "
                "distill.form=topk"
            )
        return Samples(k=config.k, vocab_size=vocab_size, temperature=temperature)
    if config.k >= vocab_size:
        raise UsageError(
            f"distill.k={config.k}: the teacher has {vocab_size} tokens; choose fewer, or distill.form=all"
        )
    return TopK(k=config.k, vocab_size=vocab_size, temperature=temperature)


def largest(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row and their tokens; on a CPU faster than topk alone."""
    num_rows, size = logits_NV.shape
    num_blocks = size // BLOCK
    if logits_NV.device.type != "cpu" or num_blocks <= 2 * k:
        return _topk(logits_NV, k)
    whole = num_blocks * BLOCK
    maxima_NM = logits_NV[:, :whole].unflatten(1, (num_blocks, BLOCK)).amax(-1)
    blocks_NK1 = maxima_NM.topk(k, dim=-1).indices.unsqueeze(-1)
    rest_NC = torch.arange(whole, size).expand(num_rows, -1)
    candidates_NC = torch.cat([(blocks_NK1 * BLOCK + torch.arange(BLOCK)).flatten(1), rest_NC], 1)
    values_NK, places_NK = _topk(logits_NV.gather(1, candidates_NC), k)
    return values_NK, candidates_NC.gather(1, places_NK)


def _topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = values.topk(k, dim=-1)
    return found.values, found.indices


def draw(p_NV: Tensor, points_NK: Tensor) -> Tensor:
    """Return the tokens at which the cumulated probabilities pass some points."""
    num_rows, size = p_NV.shape
    padded_NV = torch.nn.functional.pad(p_NV, (0, -size % BLOCK))
    blocks_NMC = padded_NV.view(num_rows, -1, BLOCK)
    ends_NM = blocks_NMC.sum(-1).cumsum(-1, dtype=torch.float64)
    points_NK = points_NK * ends_NM[:, -1:]  # rounding: they do not sum to 1
    block_NK = torch.searchsorted(ends_NM, points_NK, right=True).clamp_max(ends_NM.shape[1] - 1)
    starts_NM = torch.cat([torch.zeros_like(ends_NM[:, :1]), ends_NM[:, :-1]], 1)
    left_NK = points_NK - starts_NM.gather(1, block_NK)
    inside_NKC = blocks_NMC.gather(1, block_NK.unsqueeze(-1).expand(-1, -1, BLOCK)).double().cumsum(-1)
    place_NK = torch.searchsorted(inside_NKC, left_NK.unsqueeze(-1), right=True).squeeze(-1)
    return (block_NK * BLOCK + place_NK.clamp_max(BLOCK - 1)).clamp_max(size - 1)


def to_codes(log_p: Tensor) -> NDArray[np.uint16]:
    """Return log-probabilities as steps below 0.

    >>> to_codes(torch.tensor([0.0, -1.0, -torch.inf])), from_codes(to_codes(torch.tensor([-1.0])))
    (array([    0,  2048, 65535], dtype=uint16), tensor([-1.]))
    """
    steps = (-log_p / STEP).round().clamp(0, 65535)
    return steps.to(torch.int32).cpu().numpy().astype(np.uint16)


def from_codes(codes: NDArray[np.uint16], device: torch.device | str = "cpu") -> Tensor:
    """Return the log-probabilities of some codes."""
    return torch.from_numpy(codes.astype(np.float32)).to(device) * -STEP


def _ids(records: Records, device: torch.device) -> Tensor:
    return torch.from_numpy(records["ids"].astype(np.int64)).to(device)


def _tempered(logits_NV: Tensor, temperature: float) -> Tensor:
    return logits_NV if temperature == 1 else logits_NV.float() / temperature
