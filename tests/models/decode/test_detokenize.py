from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from models.base.errors import UsageError
from models.decode.detokenize import Detokenizer, StopStrings

TEXTS = st.text(alphabet="ab", max_size=14)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(tokens=st.lists(st.integers(0, 255), max_size=30), prompt=st.text(max_size=8))
def test_the_pieces_are_the_text_even_of_broken_bytes(
    tokens: list[int], prompt: str, byte_tokenizer: Tokenizer
) -> None:
    prompt_ids = byte_tokenizer.encode(prompt).ids
    detokenizer = Detokenizer(byte_tokenizer, prompt_ids)
    text = "".join(detokenizer.add(token) for token in tokens) + detokenizer.flush()
    assert prompt + text == byte_tokenizer.decode(prompt_ids + tokens)


@given(text=st.text(max_size=20))
def test_no_character_is_ever_split(text: str, byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer, [])
    shown = ""
    for token in byte_tokenizer.encode(text).ids:
        shown += detokenizer.add(token)
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_a_space_that_the_decoder_drops_at_the_front_is_kept() -> None:
    tokenizer = Tokenizer(WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    detokenizer = Detokenizer(tokenizer, [0])
    assert tokenizer.decode([1]) == "world"
    assert [detokenizer.add(1), detokenizer.add(0)] == [" world", " hello"]


def first_stop(text: str, stops: list[str]) -> str:
    """Character by character: cut at the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(TEXTS, STOPS, st.lists(st.integers(0, 14), max_size=5))
def test_the_text_is_cut_at_the_first_stop_string_however_it_comes_in_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(cuts), len(text)]
    stop = StopStrings(stops)
    shown = ""
    for start, end in pairwise(edges):
        shown += stop.add(text[start:end])
        assert first_stop(text, stops).startswith(shown)  # nothing is taken back
    assert shown + stop.flush() == first_stop(text, stops)
    assert stop.stopped == (first_stop(text, stops) != text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["\n\n", "END"])
    assert [stop.add(text) for text in ("one\n", "two", " E", "N", "d")] == [
        "one",
        "\ntwo",
        " ",
        "",
        "ENd",
    ]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="--stop is empty"):
        StopStrings(["\n", ""])
