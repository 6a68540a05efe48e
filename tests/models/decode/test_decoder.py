"""A model and its draft opened in one call: what decodes, who drafts, and what a wrong name is told."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from models.base.errors import NestlingError, UsageError
from models.checkpoint.family import Member
from models.checkpoint.folder import save_model
from models.decode.decoder import Decoder, open_decoder
from models.decode.sampling.params import SamplingParams
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.packed.quantize import packed_bytes

WARM = SamplingParams(temperature=1.0)
PROMPTS = ["ab", "hello", "x y z"]
D = Granularity.parse("layers=0-1")


@pytest.fixture
def path(tiny_model: ElasticLM, byte_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A family of one member, over bytes."""
    config = dataclasses.replace(tiny_model.config, vocab_size=257)
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    members = [Member(name="D", granularity=str(D), parameters=1, match=90.0, alpha=0.9)]
    return save_model(tmp_path / "model", model, tokenizer=byte_tokenizer, family={"D": D}, members=members)


def opened(path: Path, **options: Any) -> Decoder:
    return open_decoder(path, dtype="fp32", **options)


def ids(decoder: Decoder, **options: Any) -> list[int]:
    return decoder.generate(PROMPTS[0], max_new_tokens=16, **options).ids


def test_a_prompt_may_be_token_ids(path: Path) -> None:
    decoder = opened(path)
    prompt_ids = decoder.tokenizer.encode(PROMPTS[0]).ids
    assert decoder.generate(prompt_ids, max_new_tokens=8).ids == ids(decoder)[:8]


@pytest.mark.parametrize(
    "ids_as",
    [
        np.array,
        torch.tensor,
        lambda ids: np.array([ids]),
        lambda ids: torch.tensor([ids]),
        lambda ids: [np.int64(one) for one in ids],
        lambda ids: [torch.tensor(one) for one in ids],
        iter,
    ],
)
def test_token_ids_may_be_arrays_or_tensors(ids_as: Any, path: Path) -> None:
    decoder = opened(path)
    prompt = ids_as(decoder.tokenizer.encode(PROMPTS[0]).ids)
    assert decoder.generate(prompt, max_new_tokens=8).ids == ids(decoder)[:8]


@pytest.mark.parametrize("rows_as", [np.array, torch.tensor, list])
def test_a_batch_may_be_rows_of_an_array_or_a_tensor(rows_as: Any, path: Path) -> None:
    decoder = opened(path)
    rows = [[97, 98], [99, 100]]
    batch = decoder.generate_batch(rows_as(rows), max_new_tokens=4)
    assert [one.ids for one in batch] == [decoder.generate(row, max_new_tokens=4).ids for row in rows]


@pytest.mark.parametrize("prompt", [np.array(3), torch.tensor([1.0]), np.array([True]), {"input_ids": [1]}])
def test_what_is_no_token_id_in_an_array_is_named(prompt: Any, path: Path) -> None:
    with pytest.raises(UsageError, match="neither a text nor a list of token ids"):
        opened(path).generate(prompt)


@pytest.mark.parametrize("prompts", [None, 3, {"a": 1}, {"input_ids": [[1]]}])
def test_what_is_no_batch_is_named(prompts: Any, path: Path) -> None:
    with pytest.raises(UsageError, match=r"prompts=.* is not a list of prompts"):
        opened(path).generate_batch(prompts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "x"),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_p", "a"),
        ("repetition_penalty", "1"),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", "3"),
        ("max_new_tokens", True),
        ("max_length", "3"),
        ("stop", [3]),
        ("stop", b"x"),
        ("stop", {"a": 1}),
        ("eos_token_id", "</s>"),
        ("eos_token_id", 1.5),
        ("eos_token_id", 10**9),
        ("eos_token_id", -1),
        ("seed", "a"),
        ("seed", 1.5),
        ("params", "x"),
        ("params", {"temperature": 1}),
        ("do_sample", "yes"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(name: str, value: Any, path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name}=.*; (give|leave)"):
        opened(path, draft="none").generate("ab", **{name: value})


def test_none_is_a_setting_that_is_not_set(path: Path) -> None:
    decoder = opened(path)
    names = ("temperature", "top_k", "top_p", "max_length", "seed", "eos_token_id", "stop", "params")
    assert ids(decoder, **dict.fromkeys(names)) == ids(decoder)
    assert len(decoder.generate("ab", max_new_tokens=None).ids) <= 128
    assert SamplingParams(temperature=None, top_p=None) == SamplingParams()  # type: ignore[arg-type]


def test_settings_may_be_numbers_of_numpy_and_torch(path: Path) -> None:
    decoder = opened(path)
    assert decoder.generate("ab", max_new_tokens=np.int64(4)).ids == ids(decoder)[:4]
    assert decoder.generate("ab", max_new_tokens=torch.tensor(4), eos_token_id=np.array([256])).ids
    assert decoder.generate("ab", max_new_tokens=4, temperature=np.float32(0.5)).ids


def test_max_length_counts_the_prompt_as_in_transformers(path: Path) -> None:
    decoder = opened(path)
    assert decoder.generate("ab", max_length=6).ids == ids(decoder)[:4]
    assert decoder.generate("ab", max_length=6, max_new_tokens=5).ids == ids(decoder)[:5]
    batch = decoder.generate_batch(["ab", "abc"], max_length=6)
    assert [len(one.ids) for one in batch] == [4, 3]
    with pytest.raises(
        UsageError, match="max_length=2 counts the prompt, which has 2 tokens; give at least 3"
    ):
        decoder.generate("ab", max_length=2)


def test_do_sample_chooses_between_greedy_and_a_temperature(path: Path) -> None:
    warm = opened(path, draft="none", params=WARM)
    assert ids(warm, do_sample=False, pad_token_id=0) == ids(opened(path))
    greedy = opened(path, draft="none")
    assert ids(greedy, do_sample=True) == ids(greedy, temperature=1.0) != ids(greedy)
    assert ids(greedy, do_sample=True, temperature=0.5) == ids(greedy, temperature=0.5)
    with pytest.raises(UsageError, match="do_sample=True with temperature=0"):
        ids(greedy, do_sample=True, temperature=0)


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": "4"},
        {"gamma": 1.5},
        {"gamma": True},
        {"gamma": np.array([1, 2])},
        {"draft": 3},
        {"draft": True},
        {"params": None},
        {"params": {"temperature": 1}},
    ],
)
def test_an_option_of_the_wrong_kind_is_named(options: dict[str, Any], path: Path) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"{name}=.*(give|choose)"):
        open_decoder(path, **options)


@pytest.mark.parametrize("place", [None, 5, b"model", [], "", "a\0b"])
def test_what_is_no_path_is_named(place: Any) -> None:
    with pytest.raises(UsageError, match=r"path=.* is no path; give one"):
        open_decoder(place)


def test_a_conversation_becomes_the_ids_of_its_template(path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(NestlingError, match="no chat template"):
        opened(path).encode_chat(messages)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    decoder = opened(path)
    assert decoder.tokenizer.decode(decoder.encode_chat(messages)) == "[user]hello"


def test_the_model_is_packed_and_its_text_does_not_depend_on_the_draft(path: Path) -> None:
    plain = opened(path, draft="none")
    assert packed_bytes(plain.folder.model) > 0
    for draft in ("D", "D@int8", "lookup", "auto", str(path)):
        assert ids(opened(path, draft=draft)) == ids(plain), draft
    coupled = {"params": WARM, "verifier": "coupled"}
    assert ids(opened(path, draft="D", **coupled)) == ids(opened(path, draft="none", **coupled))


@pytest.mark.parametrize(
    ("options", "adapts", "copies"),
    [
        ({}, True, True),
        ({"draft": "D"}, True, False),
        ({"draft": "D", "gamma": 3}, False, False),
        ({"draft": "auto", "gamma": 3}, False, False),
        ({"draft": "none", "gamma": "auto"}, False, False),
        ({"params": WARM}, False, False),
        ({"params": WARM, "draft": "D"}, False, False),
        ({"params": WARM, "draft": "D", "gamma": "auto"}, True, False),
        ({"params": WARM, "draft": "D", "verifier": "coupled"}, True, False),
    ],
)
def test_a_clock_decides_only_where_the_text_does_not_depend_on_it_or_it_was_asked_for(
    path: Path, options: dict[str, Any], adapts: bool, copies: bool
) -> None:
    decoder = opened(path, **options)
    assert (decoder.drafting.adapts, decoder.drafting.copies) == (adapts, copies)


def test_streamed_pieces_are_the_text_and_a_seed_gives_it_again(path: Path) -> None:
    decoder = opened(path, draft="D", params=WARM)
    assert (decoder.drafting.name, decoder.drafting.gamma) == ("D", 4)
    pieces = decoder.stream(PROMPTS[0], max_new_tokens=16, seed=1)
    text = "".join(piece.text for piece in pieces)
    result = pieces.result()
    assert text == result.text
    assert result.report.drafted > 0
    assert result.ids == ids(decoder, seed=1) != ids(decoder, seed=2)
    whole = decoder.generate(PROMPTS[0], max_new_tokens=16, seed=1).text
    stop = whole[len(whole) // 2]
    assert (
        decoder.generate(PROMPTS[0], max_new_tokens=16, seed=1, stop=[stop]).text == whole.partition(stop)[0]
    )


@pytest.mark.parametrize("draft", ["D", "lookup", "FOLDER"])
def test_texts_of_a_batch_are_what_each_is_alone(path: Path, draft: str) -> None:
    decoder = opened(path, draft=draft.replace("FOLDER", str(path)))
    rows = decoder.generate_batch(PROMPTS, max_new_tokens=12)
    alone = [decoder.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    assert [row.ids for row in rows] == [one.ids for one in alone]
    assert {row.report.rounds for row in rows} != {11}, "nothing was drafted"


def test_what_makes_no_sense_is_named(path: Path, tiny_model: ElasticLM, tmp_path: Path) -> None:
    for options, named in (
        ({"draft": "Q"}, "--draft Q is neither a member of the family nor a folder"),
        ({"gamma": -1}, "--gamma must be 0 or more, or auto, got -1"),
        ({"verifier": "tree"}, "'tree' is not one of"),
    ):
        with pytest.raises(UsageError, match=named):
            opened(path, **options)
    with pytest.raises(NestlingError, match=r"mute has no tokenizer.json"):
        opened(save_model(tmp_path / "mute", tiny_model))
