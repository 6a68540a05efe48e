from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base.errors import UsageError
from train.data.documents import (
    checked_text,
    is_validation,
    require_field,
    sample_documents,
    split_into_pieces,
)


@given(st.text(alphabet="ab\n"), st.integers(1, 5))
def test_pieces_joined_are_the_text_and_none_is_much_longer_than_asked(text: str, size: int) -> None:
    pieces = list(split_into_pieces(text, size))

    assert "".join(pieces) == text
    assert all(1 <= len(piece) <= 2 * size for piece in pieces)


def test_a_document_is_on_the_same_side_whatever_surrounds_it() -> None:
    texts = [f"document {number}" for number in range(500)]

    held_out = {text for text in texts if is_validation(text, 0.1)}

    assert {text for text in reversed(texts[:250]) if is_validation(text, 0.1)} == {
        text for text in texts[:250] if text in held_out
    }
    assert 20 < len(held_out) < 90


def test_a_larger_fraction_holds_out_all_that_a_smaller_one_does() -> None:
    texts = [str(number) for number in range(1000)]

    small, large = ({t for t in texts if is_validation(t, share)} for share in (0.05, 0.2))

    assert small < large


def test_no_fraction_holds_out_nothing() -> None:
    assert not any(is_validation(str(number), 0.0) for number in range(1000))


@given(st.lists(st.text("abc", min_size=1, max_size=8)), st.integers(8, 60))
def test_a_sample_is_bounded_and_holds_nothing_that_was_not_there(texts: list[str], max_chars: int) -> None:
    sample = sample_documents(texts, max_chars)

    assert not Counter(sample) - Counter(texts)
    assert sum(map(len, sample)) <= max_chars
    assert bool(sample) == bool(texts)


def test_a_sample_is_drawn_from_the_end_as_well_as_from_the_beginning() -> None:
    texts = [f"{number:06d}" for number in range(4000)]

    sample = [int(text) for text in sample_documents(texts, max_chars=6000)]

    # all 1,000 from one half: a chance of 2 ** -999
    assert min(sample) < 2000 <= max(sample)
    assert sample == sorted(sample)
    assert len(sample) == 1000


def test_small_text_is_its_own_sample() -> None:
    assert sample_documents(["b", "a"], max_chars=100) == ["b", "a"]


def test_a_missing_field_is_named_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"data.text_field='text': here has no .*: body, id$"):
        require_field({"body": "", "id": 1}, "text", "here")


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    assert checked_text("a\ud800b", "text", "here") == "a\N{REPLACEMENT CHARACTER}b"
    assert checked_text("grün 🌳", "text", "here") == "grün 🌳"
