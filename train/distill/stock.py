"""A teacher that our own class cannot hold, through the forward pass of transformers.

It runs one row at a time, in order, as the loss asks for its positions: logits of a whole micro-batch over a
large vocabulary would take gigabytes.

B rows, T positions, N positions of all rows, V vocabulary.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.base.paths import utf8_path
from train.objective.positions import Index, rows_of
from train.objective.teacher import LogitTeacher, TeacherShape, frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_stock_shape(path: Path) -> TeacherShape | None:
    """Return the shape of a causal model that transformers knows; None if it does not know it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with utf8_path(path) as spelled:
            config = AutoConfig.from_pretrained(spelled, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None
    text = config.get_text_config(decoder=True)
    return TeacherShape(
        vocab_size=text.vocab_size,
        parameters=sum(one.numel() for one in model.parameters()),
        longest=getattr(text, "max_position_embeddings", None),
    )


def load_stock_teacher(path: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Open a folder with transformers, in a dtype and in evaluation mode.

    Raises:
        NestlingError: if its weights are missing, damaged, or not all there.
    """
    from transformers import AutoModelForCausalLM

    try:
        with utf8_path(path) as spelled:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                spelled, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # safetensors, transformers and torch each raise their own kinds
        reason = " ".join(str(error).split())
        raise NestlingError(f"{path} does not open in transformers ({reason}); restore it") from error
    model, report = opened
    if missing := sorted(report["missing_keys"]):
        raise NestlingError(f"{path} lacks {missing[0]} and {len(missing) - 1} more weights; restore it")
    stock: PreTrainedModel = model.eval().requires_grad_(False)
    return stock


class StockTeacher(LogitTeacher):
    """A model of transformers.

    Args:
        model: the model.
        record: see `Teacher`.
        device: where it runs; None: where the student trains.
    """

    def __init__(
        self, model: "PreTrainedModel", record: Mapping[str, str], device: torch.device | None = None
    ) -> None:
        super().__init__(model.config.get_text_config(decoder=True).vocab_size, record, device)
        self.model: Any = model

    def place(self, device: torch.device) -> None:
        """See `Teacher`."""
        self.model.to(self.device or device)

    def logits(self, tokens_BT: Tensor) -> Callable[[Index], Tensor]:
        """See `LogitTeacher`."""
        return _StockLogits(self.model, tokens_BT.to(self.model.device))


class _StockLogits:
    """The logits of rows, made when they are asked for; the last row stays, as two chunks may share it."""

    def __init__(self, model: Any, tokens_BT: Tensor) -> None:
        self.model = model
        self.tokens_BT = tokens_BT
        self.latest: tuple[int, Tensor] | None = None

    def __call__(self, here: Index) -> Tensor:
        each = rows_of(here, self.tokens_BT.shape[1])
        return torch.cat([self._row(row)[part] for row, part in each] or [self._row(0)[:0]])

    def _row(self, row: int) -> Tensor:
        if self.latest is None or self.latest[0] != row:
            with frozen(self.model.device):
                logits_TV = self.model(self.tokens_BT[row : row + 1], use_cache=False).logits[0]
            self.latest = row, logits_TV
        return self.latest[1]
