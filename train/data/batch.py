"""Rows of token ids and labels, as the loader gives them and the objective takes them."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Rows of one optimizer step, or a part of them.

    Args:
        tokens_BT: Token ids.
        labels_BT: The next tokens; -100 where there is none.
        step: The optimizer step.
        first_row: Index of the first row among the rows of the step.
        num_rows: Rows of the step, over all micro-batches and processes.
        num_valid: Valid labels of the step: the one divisor.
        stride: Distance from one row to the next: the number of processes that divide the micro-batch.
        row_ids_B: Numbers of the rows in the text, if it is known.
        written_BT: True where the next token is not of the text, and no label for cross-entropy.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    step: int
    first_row: int
    num_rows: int
    num_valid: int
    stride: int = 1
    row_ids_B: Tensor | None = None
    written_BT: Tensor | None = None

    @property
    def rows(self) -> range:
        """The rows of the step that this process has."""
        return range(self.first_row, self.first_row + len(self.tokens_BT) * self.stride, self.stride)

    @property
    def rows_everywhere(self) -> range:
        """The rows of the step that the micro-batch has, over all processes."""
        start = self.first_row - self.first_row % self.stride  # that of the first process
        return range(start, start + len(self.tokens_BT) * self.stride)
