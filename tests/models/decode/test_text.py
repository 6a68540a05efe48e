"""From prompt to text, over models that are known to say a given text."""

import sys
import threading
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from models.base.errors import NestlingError, UsageError
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.policy import Fixed
from models.decode.sampling.params import SamplingParams
from models.decode.text import encode_prompt, generate_batch, stream_text
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View

TEXT = "aé€😀bђcdfgh"  # no byte occurs twice, so that each one tells the next
PROMPT = "."
END = 256


def parrot(tokenizer: Tokenizer, wrong: tuple[int, ...] = (), **fields: Any) -> ElasticLM:
    """Says TEXT after PROMPT, then the end token; a draft may be wrong about the token at some places.

    The layers add nothing to the embedding, which is one-hot: the head is the table of next tokens.
    """
    size = 260
    shape: dict[str, Any] = {"vocab_size": END + 1, "hidden_size": size, "intermediate_size": 2}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape |= {"tie_word_embeddings": False, "eos_token_id": END, "max_position_embeddings": 64}
    model = ElasticLM(ElasticConfig(**(shape | fields))).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    torch.nn.init.eye_(model.model.embed_tokens.weight)
    torch.nn.init.ones_(model.model.norm.weight)
    said = [*tokenizer.encode(PROMPT + TEXT).ids, END]
    for place, (token, following) in enumerate(pairwise(said)):
        model.lm_head.weight[0 if place in wrong else following, token] = 1.0
    return model.eval()


@pytest.fixture(params=["plain", "all accepted", "some accepted"])
def drafting(request: pytest.FixtureRequest, byte_tokenizer: Tokenizer) -> dict[str, Any]:
    """A target and a draft: none, itself, or one that is wrong here and there."""
    target = parrot(byte_tokenizer)
    drafts: dict[str, Draft | None] = {
        "plain": None,
        "all accepted": NestedDraft(View(target, FULL)),
        "some accepted": ModelDraft(parrot(byte_tokenizer, wrong=(2, 6, 9, 15))),
    }
    return {"target": target, "tokenizer": byte_tokenizer, "draft": drafts[request.param], "gamma": 5}


def test_the_text_ends_where_the_model_ends_it(drafting: dict[str, Any]) -> None:
    result = stream_text(prompt=PROMPT, **drafting).finish()
    assert result.text == TEXT
    assert result.ids == [*drafting["tokenizer"].encode(TEXT).ids, END]
    assert result.report.finish_reason == "eos"
    assert result.report.num_tokens == len(result.ids)


def test_a_stop_string_may_start_and_end_anywhere_in_a_block(drafting: dict[str, Any]) -> None:
    for start in range(len(TEXT)):
        for length in (1, 2, 4):
            stop = TEXT[start : start + length]
            result = stream_text(prompt=PROMPT, stop=["nowhere", stop], **drafting).finish()
            assert result.text == TEXT[:start], stop
            assert result.report.finish_reason == "stop"
            counted = drafting["tokenizer"].encode(TEXT[:start] + stop).ids
            assert result.ids == counted
            assert result.report.num_tokens == len(counted)


def test_the_limit_may_cut_a_character(drafting: dict[str, Any]) -> None:
    ids = drafting["tokenizer"].encode(TEXT).ids
    for limit in range(1, len(ids) + 1):
        result = stream_text(prompt=PROMPT, max_new_tokens=limit, **drafting).finish()
        assert result.ids == ids[:limit]
        assert result.text == drafting["tokenizer"].decode(ids[:limit])
        assert result.report.finish_reason == "length"


def test_what_may_begin_a_stop_string_is_shown_when_the_text_ends(drafting: dict[str, Any]) -> None:
    result = stream_text(prompt=PROMPT, stop=["gh and more"], **drafting).finish()
    assert result.text == TEXT
    assert result.report.finish_reason == "eos"


def test_the_stream_gives_the_text_in_whole_characters(drafting: dict[str, Any]) -> None:
    pieces = list(stream_text(prompt=PROMPT, **drafting))
    assert [piece.text for piece in pieces] == list(TEXT)
    assert any(piece.drafted for piece in pieces) == (drafting["draft"] is not None)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_k=40)])
def test_the_stream_is_the_whole_text(
    params: SamplingParams, tiny_model: ElasticLM, byte_tokenizer: Tokenizer
) -> None:
    draft = NestedDraft(View(tiny_model, Granularity.parse("layers=0-2")))
    options: dict[str, Any] = {"draft": draft, "params": params, "max_new_tokens": 60, "seed": 3}
    pieces = stream_text(tiny_model, byte_tokenizer, "!!", **options)
    text = "".join(piece.text for piece in pieces)
    whole = stream_text(tiny_model, byte_tokenizer, "!!", **options).finish()
    assert text == whole.text == pieces.result().text
    assert pieces.result().ids == whole.ids
    assert text == byte_tokenizer.decode(whole.ids)


def test_a_stream_that_was_left_has_what_was_taken(byte_tokenizer: Tokenizer) -> None:
    pieces = stream_text(parrot(byte_tokenizer), byte_tokenizer, PROMPT)
    taken = [next(pieces).text for _ in range(3)]
    result = pieces.result()
    assert result.text == "".join(taken) == TEXT[:3]
    assert result.ids == byte_tokenizer.encode(TEXT[:3]).ids


def test_the_seed_decides_a_sampled_text(tiny_model: ElasticLM, byte_tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=1.0)
    streams = [stream_text(tiny_model, byte_tokenizer, "!", params=params, seed=seed) for seed in (1, 1, 2)]
    texts = [stream.finish().text for stream in streams]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id"])
def test_an_empty_prompt_starts_from_the_models_own_token(field: str, byte_tokenizer: Tokenizer) -> None:
    (start,) = byte_tokenizer.encode(PROMPT).ids
    fields: dict[str, Any] = {"eos_token_id": None, field: start}
    model = parrot(byte_tokenizer, **fields)
    assert stream_text(model, byte_tokenizer, "", eos_token_ids=[END]).finish().text == TEXT


def test_an_empty_prompt_without_such_a_token_is_refused(
    tiny_model: ElasticLM, byte_tokenizer: Tokenizer
) -> None:
    with pytest.raises(UsageError, match="--prompt is empty, and the model has no bos or eos token"):
        stream_text(tiny_model, byte_tokenizer, "")


def test_a_prompt_longer_than_the_context_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="--prompt has 70 tokens, but the model's context holds 64"):
        stream_text(parrot(byte_tokenizer), byte_tokenizer, "x" * 70)


def test_the_result_as_a_dictionary_has_the_documented_fields(byte_tokenizer: Tokenizer) -> None:
    ours = stream_text(parrot(byte_tokenizer), byte_tokenizer, PROMPT).finish().as_dict()
    assert ours["text"] == TEXT
    assert {"text", "ids", "tokens_per_second", "tau", "alpha"} <= ours.keys()


def test_each_of_several_end_tokens_ends_the_text(byte_tokenizer: Tokenizer) -> None:
    (other,) = byte_tokenizer.encode("c").ids
    model = parrot(byte_tokenizer, eos_token_id=[END, other])
    assert stream_text(model, byte_tokenizer, PROMPT).finish().text == TEXT[: TEXT.index("c")]
    plain = partial(Fixed, None, 0)
    results = generate_batch(model, byte_tokenizer, [PROMPT, PROMPT], new_policy=plain)
    assert [result.text for result in results] == [TEXT[: TEXT.index("c")]] * 2
    assert {result.report.finish_reason for result in results} == {"eos"}


def test_logits_that_are_no_numbers_end_in_one_line(byte_tokenizer: Tokenizer) -> None:
    model = parrot(byte_tokenizer)
    model.model.norm.weight.fill_(1e38)
    model.lm_head.weight.fill_(1e38)
    with pytest.raises(NestlingError, match=r"logits are not numbers.*--dtype fp32"):
        stream_text(model, byte_tokenizer, PROMPT).finish()


def test_a_prompt_may_be_token_ids(byte_tokenizer: Tokenizer) -> None:
    model = parrot(byte_tokenizer)
    ids = byte_tokenizer.encode(PROMPT).ids
    assert stream_text(model, byte_tokenizer, ids).finish().text == TEXT


@pytest.mark.parametrize("prompt", [None, 3, b"a", ["a"], [1, 99999], [-1], [True]])
def test_a_prompt_that_is_neither_text_nor_ids_is_named(prompt: Any, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="neither a text nor a list of token ids below 257"):
        stream_text(parrot(byte_tokenizer), byte_tokenizer, prompt)


def test_one_text_is_no_batch(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="prompts is one text"):
        generate_batch(parrot(byte_tokenizer), byte_tokenizer, "ab", new_policy=partial(Fixed, None, 0))


def test_settings_go_by_the_names_that_hugging_face_gives_them(byte_tokenizer: Tokenizer) -> None:
    model = parrot(byte_tokenizer)
    (other,) = byte_tokenizer.encode("c").ids
    upto = TEXT[: TEXT.index("c")]
    assert stream_text(model, byte_tokenizer, PROMPT, eos_token_id=other).finish().text == upto
    assert stream_text(model, byte_tokenizer, PROMPT, stop_strings="c").finish().text == upto
    assert (
        stream_text(model, byte_tokenizer, PROMPT, stop=None, top_k=1, temperature=1.0).finish().text == TEXT
    )
    with pytest.raises(UsageError, match=r"tempratur is no setting .*did you mean temperature\?"):
        stream_text(model, byte_tokenizer, PROMPT, tempratur=1.0)


def test_other_threads_run_while_a_long_text_is_encoded(
    tiny_model: ElasticLM, byte_level_tokenizer: Tokenizer
) -> None:
    """Python's lock passes to another thread while the tokenizer works: here it may pass nowhere else."""
    go, ran = threading.Event(), threading.Event()

    def run() -> None:
        go.wait()
        ran.set()

    other = threading.Thread(target=run)
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        passed = any(
            encode_prompt(tiny_model, byte_level_tokenizer, "ab " * 20_000) and ran.is_set()
            for _ in range(100)
        )
    finally:
        sys.setswitchinterval(interval)
        other.join()
    assert passed
