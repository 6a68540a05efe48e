import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base.labels import IGNORE_INDEX
from train.data.pack import Rows, hold_out_tail

lengths = st.integers(1, 60)


@given(lengths, st.integers(1, 9))
def test_every_token_but_the_first_is_a_label_exactly_once_after_its_predecessor(
    length: int, sequence_length: int
) -> None:
    stream = np.arange(100, 100 + length, dtype=np.uint16)
    rows = Rows(stream=stream, sequence_length=sequence_length)

    tokens_BT, labels_BT = rows.gather(np.arange(len(rows)))

    is_label_BT = labels_BT != IGNORE_INDEX
    assert labels_BT[is_label_BT].tolist() == stream[1:].tolist()
    assert tokens_BT[is_label_BT].tolist() == stream[:-1].tolist()


@given(lengths, st.integers(1, 9), st.lists(st.integers(0, 70), min_size=1))
def test_labels_are_counted_without_reading_them(length: int, sequence_length: int, ids: list[int]) -> None:
    rows = Rows(stream=np.zeros(length, np.uint16), sequence_length=sequence_length)

    _, labels_BT = rows.gather(np.array(ids))

    assert rows.count_labels(np.array(ids)) == int((labels_BT != IGNORE_INDEX).sum())


def test_a_row_past_the_end_has_no_labels_and_valid_inputs() -> None:
    rows = Rows(stream=np.array([3, 1, 2], np.uint16), sequence_length=4)

    tokens_BT, labels_BT = rows.gather(np.array([0, 1]))

    assert tokens_BT.tolist() == [[3, 1, 2, 3], [3, 3, 3, 3]]
    assert labels_BT.tolist() == [[1, 2, -100, -100], [-100, -100, -100, -100]]


def test_a_stream_without_a_document_has_no_rows() -> None:
    assert len(Rows(stream=np.array([0], np.uint16), sequence_length=4)) == 0


@given(st.integers(2, 60), st.floats(0.01, 0.99))
def test_holding_out_the_tail_keeps_every_label_in_one_part(length: int, fraction: float) -> None:
    stream = np.arange(length)

    train, valid = hold_out_tail(stream, fraction)

    assert [*train[1:], *valid[1:]] == list(stream[1:])
    assert len(train) > 1
    if length > 2:
        assert len(valid) > 1


@pytest.mark.parametrize(("fraction", "expected"), [(0.02, 1), (0.5, 5), (0.99, 9)])
def test_the_tail_is_the_share_asked_for_and_at_least_one(fraction: float, expected: int) -> None:
    _, valid = hold_out_tail(np.arange(11), fraction)

    assert len(valid) - 1 == expected
