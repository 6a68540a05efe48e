"""Stored habits of tokenizers: a prompt is whole, and encoded as transformers or training would."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer

from models.base.errors import NestlingError
from models.checkpoint.folder import load_model, save_model
from models.checkpoint.tokenizer import for_bare_text, open_tokenizer
from models.elastic.model import ElasticLM
from train.data.tokenizer import load_tokenizer

TEXT = "a text of more than eight tokens"


def make_tokenizer() -> Tokenizer:
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE({**letters, "th": 256}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<s>", "<pad>"])
    return tokenizer


def cut(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(8)


def fill(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=64, pad_id=259, pad_token="<pad>")


def fill_to_a_multiple(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(direction="left", pad_to_multiple_of=16, pad_id=259, pad_token="<pad>")


def drop_merges(tokenizer: Tokenizer) -> None:
    tokenizer.model.dropout = 0.5


def surround(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 258), ("</s>", 257)]
    )


HABITS: list[Callable[[Tokenizer], None]] = [cut, fill, fill_to_a_multiple, drop_merges]


def save(folder: Path, *habits: Callable[[Tokenizer], None], **settings: object) -> Path:
    tokenizer = make_tokenizer()
    for habit in habits:
        habit(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("habit", HABITS)
def test_a_stored_habit_does_not_change_a_prompt(habit: Callable[[Tokenizer], None], tmp_path: Path) -> None:
    tokenizer = open_tokenizer(save(tmp_path, habit))
    expected = make_tokenizer().encode(TEXT).ids
    assert all(tokenizer.encode(TEXT).ids == expected for _ in range(5))
    assert load_tokenizer(str(tmp_path)).backend.encode(TEXT).ids == expected


def test_what_a_model_folder_opens_is_the_whole_prompt(tiny_model: ElasticLM, tmp_path: Path) -> None:
    from dataclasses import replace

    model = ElasticLM(replace(tiny_model.config, vocab_size=260))
    folder = save_model(tmp_path / "model", model)
    save(folder, cut, fill)
    tokenizer = load_model(folder).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode(TEXT).ids == make_tokenizer().encode(TEXT).ids


@pytest.mark.parametrize(
    ("habits", "settings"),
    [
        ((), {}),
        ((surround,), {}),
        ((), {"add_bos_token": True}),
        ((), {"add_eos_token": True}),
        ((), {"add_bos_token": True, "add_eos_token": True}),
        ((surround,), {"add_bos_token": False}),
        ((surround,), {"add_bos_token": True}),
        ((), {"add_bos_token": True, "bos_token": {"content": "<s>", "__type": "AddedToken"}}),
        ((cut, fill, surround), {}),
    ],
)
def test_a_prompt_has_the_tokens_around_it_that_transformers_would_put(
    habits: tuple[Callable[[Tokenizer], None], ...], settings: dict[str, object], tmp_path: Path
) -> None:
    path = save(tmp_path, *habits, **settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert open_tokenizer(path).encode(TEXT).ids == theirs(TEXT)["input_ids"]


def test_a_model_that_is_trained_takes_a_tokenizer_that_encodes_prompts_as_its_text(tmp_path: Path) -> None:
    save(tmp_path, surround, cut)
    trained = load_tokenizer(str(tmp_path)).backend
    bare = make_tokenizer().encode(TEXT, add_special_tokens=False).ids
    assert trained.encode(TEXT).ids == bare
    assert for_bare_text(trained).to_str() == trained.to_str()


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model": {"type": "BPE"}}', "\0" * 9])
def test_what_is_no_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(NestlingError, match=r"tokenizer\.json is not a tokenizer"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_an_id_around_a_text_that_the_model_has_not_is_refused(tiny_model: ElasticLM, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = save_model(tmp_path / "model", ElasticLM(replace(tiny_model.config, vocab_size=260)))
    path = save(folder, surround)
    path.write_text(path.read_text().replace("258\n", "9999\n"))
    with pytest.raises(NestlingError, match=r"tokenizer\.json has token ids up to 9999, but vocab_size=260"):
        load_model(folder)
