"""The loss of members at each token of one text, so that two of them are compared token by token.

Most of what makes a text hard is hard for every member: the mean of paired differences is known far better
than either loss. What was measured is kept in a file, so that a member is never measured twice on a text.

N valid positions.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.base.files import default_cache_dir, write_file
from models.checkpoint.weights import hash_family
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure.perplexity import check_some, exact_logits, row_chunks, select_valid

Report: TypeAlias = Callable[[str, int, int], object]
"""Told what is being done, how much of it is done, and of how much."""
SAVED_EVERY = 16
"""Members that are measured between two saves."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean of paired differences of losses, in nats per token, and its standard error."""

    mean: float
    error: float


class TokenLosses:
    """Losses of members of a model on a text.

    Args:
        model: the elastic model.
        batches: tokens and labels [B, T].
        path: file that keeps what is measured; None keeps nothing.

    Raises:
        NestlingError: if no position has a label.
    """

    def __init__(
        self, model: ElasticLM, batches: Sequence[tuple[Tensor, Tensor]], path: Path | None = None
    ) -> None:
        self.model, self.batches, self.path = model, batches, path
        self.num_tokens = check_some(sum(int((labels_BT >= 0).sum()) for _, labels_BT in batches))
        self.num_measured = 0
        self._losses: dict[str, Tensor] = {} if path is None else _read(path, self.num_tokens)

    def measure(self, members: Iterable[Granularity], report: Report | None = None, label: str = "") -> None:
        """Measure each member that was not measured before."""
        missing = {str(one): one for one in members if str(one) not in self._losses}
        for number, (text, member) in enumerate(missing.items()):
            if report:
                report(label, number, len(missing))
            self._losses[text] = self._run(member)
            self.num_measured += 1
            if number % SAVED_EVERY == SAVED_EVERY - 1:
                self.save()
        if missing:
            self.save()

    def losses(self, member: Granularity) -> Tensor:
        """Return the losses [N] of a member."""
        self.measure([member])
        return self._losses[str(member)]

    def mean(self, member: Granularity) -> float:
        """Return the loss of a member, in nats per token."""
        return float(self.losses(member).double().mean())

    def compare(self, one: Granularity, other: Granularity) -> Difference:
        """Return by how much the loss of `one` exceeds that of `other`."""
        differences_N = self.losses(one).double() - self.losses(other).double()
        error = float(differences_N.std()) / math.sqrt(len(differences_N)) if len(differences_N) > 1 else 0.0
        return Difference(mean=float(differences_N.mean()), error=error)

    def save(self) -> None:
        """Keep what was measured; a cache that cannot be written costs time, not the result."""
        if self.path is None:
            return
        names = json.dumps(list(self._losses))
        losses_MN = torch.stack(list(self._losses.values()))
        try:
            with write_file(self.path) as partial:
                save_file({"losses": losses_MN}, partial, metadata={"members": names})
        except (OSError, SafetensorError):
            self.path = None

    @torch.no_grad()
    def _run(self, member: Granularity) -> Tensor:
        view, parts = View(self.model, member), []
        for tokens_BT, labels_BT in self.batches:
            states_BTD = view.model.states(tokens_BT.to(self.model.device), view.granularity)[-1]
            labels_N, (x_ND,) = select_valid(labels_BT.to(self.model.device), [states_BTD])
            for rows in row_chunks(len(labels_N), self.model.config.vocab_size):
                logits_NV = exact_logits(view, x_ND[rows])
                parts.append(cross_entropy(logits_NV, labels_N[rows], reduction="none").float().cpu())
        return torch.cat(parts)


def losses_path(folder: Path, batches: Iterable[tuple[Tensor, Tensor]], dtype: str) -> Path:
    """Return where the losses of a model's members on a text are kept: by what the weights and tokens are."""
    digest = hashlib.sha256(f"{hash_family(folder)} {dtype}".encode())
    if folder.is_dir():
        digest.update((folder / "config.json").read_bytes())
    for batch in batches:
        for part_BT in batch:
            digest.update(part_BT.numpy().tobytes())
    return default_cache_dir() / f"losses-{digest.hexdigest()[:16]}.safetensors"


def _read(path: Path, num_tokens: int) -> dict[str, Tensor]:
    """Return what a file keeps; nothing if there is none, or a damaged one, which is then written again."""
    try:
        with safe_open(path, "pt") as file:
            names, losses_MN = json.loads(file.metadata()["members"]), file.get_tensor("losses")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}
    fits = losses_MN.shape == (len(names), num_tokens) and losses_MN.isfinite().all()
    return dict(zip(names, losses_MN, strict=True)) if fits else {}
