"""Differences to the full model's text."""

from hypothesis import given
from hypothesis import strategies as st

from train.report.samples import compare

TEXT = st.text(alphabet="ab .\n", max_size=30)


@given(TEXT, TEXT)
def test_the_pieces_spell_the_text_and_the_unmarked_ones_occur_in_the_reference_in_order(
    text: str, reference: str
) -> None:
    pieces = compare(text, reference).pieces
    assert "".join(piece for piece, _ in pieces) == text
    place = 0
    for piece, same in pieces:
        if same:
            place = reference.index(piece, place) + len(piece)


@given(TEXT)
def test_an_equal_text_has_no_marks(text: str) -> None:
    comparison = compare(text, text)
    assert all(same for _, same in comparison.pieces)
    assert comparison.same == 1.0


def test_texts_without_a_common_word_are_all_marks() -> None:
    comparison = compare("one", "two")
    assert comparison.pieces == (("one", False),)
    assert comparison.same == 0.0
