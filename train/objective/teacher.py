"""What a run needs of a teacher: the frozen model that its full model learns from.

A teacher may be a model in memory, a server, or a file that was written before: the joint loss sees only
how far the student is from it, position by position. The kinds are in train/distill.

N positions, V vocabulary, D model.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from torch import Tensor

from models.elastic.config import ElasticConfig
from models.elastic.count import count_flops, count_parameters, count_weight_bytes
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.data.module import TextData
from train.objective.losses import divergence
from train.objective.positions import Index
from train.recipe.sections import LossConfig


class Targets(Protocol):
    """What a teacher says about all positions of a micro-batch, read a chunk at a time and in order."""

    def divergence(self, here: Index, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """Return the divergence [N] of a student's logits from the teacher at some positions."""
        ...


class Teacher(Protocol):
    """A frozen teacher.

    `record` is the part of a model's provenance that names it; `sha256` there is its identity.
    """

    @property
    def record(self) -> Mapping[str, str]:
        """Names it: its path, and a hash of what it says."""
        ...

    def prepare(self, data: TextData, console: Console | None) -> None:
        """Get ready for the text of a run, before it begins: a cache is made or opened."""
        ...

    def place(self, device: torch.device) -> None:
        """Move to the device that the student trains on, unless a setting named another."""
        ...

    def targets(self, batch: Batch) -> Targets:
        """Read a micro-batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class TeacherShape:
    """What is known of a teacher before its weights are read.

    Args:
        vocab_size: width of its logits.
        parameters: their number; 0 where it runs elsewhere.
        longest: positions that it reads; None where that is not known.
        elastic: its shape, where it is a model of our own class.
        note: what a user should know of it; may be empty.
    """

    vocab_size: int
    parameters: int = 0
    longest: int | None = None
    elastic: ElasticConfig | None = None
    note: str = ""

    @classmethod
    def of(cls, config: ElasticConfig) -> "TeacherShape":
        """Return the shape of a model of our own class."""
        return cls(
            vocab_size=config.vocab_size,
            parameters=count_parameters(config),
            longest=config.max_position_embeddings,
            elastic=config,
        )

    def flops(self, num_tokens: int) -> int:
        """Return the operations of a pass over one row; about two for each parameter and token."""
        if self.elastic is None:
            return 2 * self.parameters * num_tokens
        return count_flops(self.elastic, num_tokens=num_tokens)

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Return the bytes of its weights."""
        if self.elastic is None:
            return self.parameters * dtype_bytes
        return count_weight_bytes(self.elastic, dtype_bytes=dtype_bytes)


class LogitTeacher(ABC):
    """A teacher whose logits can be had.

    Args:
        vocab_size: their width.
        record: see `Teacher`.
        device: where it runs; None: where the student trains.
    """

    def __init__(self, vocab_size: int, record: Mapping[str, str], device: torch.device | None) -> None:
        self.vocab_size = vocab_size
        self.record = dict(record)
        self.device = device

    def prepare(self, data: TextData, console: Console | None) -> None:  # noqa: B027 - a hook
        """See `Teacher`."""

    @abstractmethod
    def place(self, device: torch.device) -> None:
        """See `Teacher`."""

    @abstractmethod
    def logits(self, tokens_BT: Tensor) -> Callable[[Index], Tensor]:
        """Read rows, and return what gives the logits [N, V] of a chunk of their positions, in order."""

    def targets(self, batch: Batch) -> Targets:
        """See `Teacher`."""
        return _LogitTargets(self.logits(batch.tokens_BT))


class _LogitTargets(NamedTuple):
    logits: Callable[[Index], Tensor]

    def divergence(self, here: Index, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """See `Targets`."""
        return divergence(self.logits(here).to(logits_NV.device), logits_NV, config)


class ElasticTeacher(LogitTeacher):
    """A model of our own class; its states are kept, and logits made of them a chunk at a time.

    Args:
        model: the model; nothing here trains it.
        record: see `Teacher`.
        device: where it runs; None: where the student trains.
    """

    def __init__(
        self, model: ElasticLM, record: Mapping[str, str] | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(model.config.vocab_size, record or {}, device)
        self.model = model.requires_grad_(False)

    def place(self, device: torch.device) -> None:
        """See `Teacher`."""
        self.model.to(self.device or device)

    def logits(self, tokens_BT: Tensor) -> Callable[[Index], Tensor]:
        """See `LogitTeacher`."""
        device = self.model.device
        with frozen(device):
            states_ND = self.model.states(tokens_BT.to(device))[-1].flatten(0, 1)

        def at(here: Index) -> Tensor:
            with frozen(device):
                return self.model.head(states_ND[here])

        return at


@contextlib.contextmanager
def frozen(device: torch.device) -> Iterator[None]:
    """Run a teacher in its own dtype and without gradients, whatever surrounds it."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
