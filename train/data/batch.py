"""Rows of token ids and labels, as the loader gives them and the objective takes them."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Rows of one optimizer step, or a part of them.

    Args:
        tokens_BT: token ids.
        labels_BT: the next tokens; -100 where there is none.
        step: the optimizer step.
        first_row: place of the first row among the rows of the step.
        num_rows: rows of the whole step, over all micro-batches and processes.
        num_valid: valid labels of the whole step: the one divisor.
        stride: places from one row to the next: the number of processes that share the micro-batch.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    step: int
    first_row: int
    num_rows: int
    num_valid: int
    stride: int = 1
