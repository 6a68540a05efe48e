"""A model and its draft opened in one call: what decodes, who drafts, and what a wrong name is told."""

import dataclasses
from pathlib import Path
from typing import Any

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
