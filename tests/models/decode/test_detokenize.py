from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from models.base.errors import NestlingError, UsageError
from models.decode.detokenize import Detokenizer, StopStrings, continuation

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


def test_a_stop_string_may_be_given_alone() -> None:
    stop = StopStrings("END")
    assert (stop.add("The EN"), stop.add("D of it"), stop.stopped) == ("The ", "", True)


# ---------------------------------------------------------------- both families of tokenizers


def byte_fallback_tokenizer() -> Tokenizer:
    """Like Llama 2's: letters, and a token for each byte of what has none; 2 ends a text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in "▁abcdefghijklmnopqrstuvwxyz!.,":
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


FALLBACK = byte_fallback_tokenizer()
EMOJI = "😀😁😂", "🇫🇷", "👩‍👩‍👧", "a👍🏽b", "é€😀"
HARD = st.lists(st.sampled_from([*EMOJI, "a", " ", "hi ", "</s>", "\N{REPLACEMENT CHARACTER}"]), max_size=5)


def pieces(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*(detokenizer.add(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", EMOJI)
def test_characters_of_several_byte_tokens_come_out_whole(text: str) -> None:
    for prompt in ("hi ", text, f"{text} {text}"):
        prompt_ids = FALLBACK.encode(prompt).ids
        ids = FALLBACK.encode(prompt + text + " and").ids[len(prompt_ids) :]
        assert "".join(pieces(FALLBACK, prompt_ids, ids)) == text + " and"


@pytest.mark.parametrize("family", ["byte fallback", "byte level"])
@given(
    prompt=HARD.map("".join),
    text=HARD.map("".join),
    noise=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4),
)
def test_the_pieces_are_what_the_tokenizer_decodes_less_the_prompt(
    family: str,
    prompt: str,
    text: str,
    noise: list[tuple[int, int]],
    byte_tokenizer: Tokenizer,
) -> None:
    tokenizer = FALLBACK if family == "byte fallback" else byte_tokenizer
    prompt_ids, ids = tokenizer.encode(prompt).ids, tokenizer.encode(text).ids
    for place, token in noise:
        ids.insert(place, token)
    expected = tokenizer.decode(prompt_ids + ids)[len(tokenizer.decode(prompt_ids)) :]
    assert "".join(pieces(tokenizer, prompt_ids, ids)) == expected == continuation(tokenizer, prompt_ids, ids)


@given(
    prompt=st.lists(st.integers(0, len(FALLBACK.get_vocab()) - 1), max_size=12),
    ids=st.lists(st.integers(0, len(FALLBACK.get_vocab()) - 1), max_size=30),
)
def test_the_pieces_of_any_tokens_are_what_the_tokenizer_decodes(prompt: list[int], ids: list[int]) -> None:
    assert "".join(pieces(FALLBACK, prompt, ids)) == continuation(FALLBACK, prompt, ids)


def test_many_special_tokens_do_not_cost_the_space_after_them() -> None:
    word, letter = FALLBACK.encode("b").ids
    ids = [*[2] * 9, word, letter]
    assert "".join(pieces(FALLBACK, [letter], ids)) == " b"


@given(text=st.text(alphabet="ab c", max_size=12), cut=st.integers(2, 8))
def test_a_decoder_that_panics_over_a_single_token_still_gives_the_text(text: str, cut: int) -> None:
    letters = {letter: number for number, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 1)])
    ids = tokenizer.encode("xy  xyxyxy" + text + "z").ids
    prompt_ids, rest = ids[:cut], ids[cut:]
    assert "".join(pieces(tokenizer, prompt_ids, rest)) == continuation(tokenizer, prompt_ids, rest)


def test_tokens_over_which_the_tokenizer_panics_are_one_line() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.Strip("a", 1, 1)
    with pytest.raises(NestlingError, match="mend `decoder`"):
        pieces(tokenizer, [0], [0])
