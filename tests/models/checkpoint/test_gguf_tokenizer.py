"""Our tokenizers as keys of a GGUF file: llama.cpp cuts text as we do, or the tokenizer is refused."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from models.base.errors import NestlingError
from models.bench.llama import is_installed, open_llama
from models.checkpoint.chat import read_chat_template
from models.checkpoint.gguf import write_gguf
from models.checkpoint.gguf_tokenizer import byte_letters, differs_on, missing_bytes, tokenizer_keys
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM

END = "<|endoftext|>"
LETTERS = "aBsStK'1²Ⅳ٣é日🙂 \t\n\r\u00a0\u2003\u3000\u0085\u2028.!_-\u0301\u200b\ufeff\u180e\u001f"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")

whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
digits = pre_tokenizers.Digits(individual_digits=True)


def by(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole])


PATTERNS = {
    "gpt-2": gpt2,
    "smollm": pre_tokenizers.Sequence([digits, gpt2]),
    "llama-bpe": by(LLAMA3),
    "qwen2": by(QWEN2),
}


def make_texts() -> list[str]:
    """Code, and what tells one pattern from another: spaces, digits, quotes, letters of many kinds."""
    source, draw = Path(__file__).read_text(encoding="utf-8"), random.Random(1)
    starts = [draw.randrange(len(source)) for _ in range(100)]
    code = [source[start : start + draw.randrange(1, 100)] for start in starts]
    return code + ["".join(draw.choices(LETTERS, k=draw.randrange(1, 30))) for _ in range(400)]


def make_tokenizer(pattern: Any = gpt2, *, ignore_merges: bool = False) -> Tokenizer:
    """Its merges were learned across words, so that only the pattern keeps words apart."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = whole, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(), trainer=trainer)
    tokenizer.pre_tokenizer = pattern
    return tokenizer


def config_of(tokenizer: Tokenizer, **changes: Any) -> ElasticConfig:
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size() + 3,  # as where a vocabulary is padded
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": 0,
    }
    return ElasticConfig(**fields | changes)


def test_the_keys_are_the_vocabulary_by_id_the_merges_in_order_and_the_end_of_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    keys = tokenizer_keys(tokenizer, config_of(tokenizer), chat_template="{{ messages }}")
    size = tokenizer.get_vocab_size()
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert [tokenizer.token_to_id(token) for token in tokens[:size]] == list(range(size))
    assert [token.startswith("[PAD") for token in tokens] == [False] * size + [True] * 3
    assert types == [3, *[1] * (size - 2), 4, 5, 5, 5]
    left, right = keys["tokenizer.ggml.merges"][0].split(" ")
    assert tokenizer.token_to_id(left + right) == 257
    assert {
        name.removeprefix("tokenizer."): keys[name] for name in keys if not isinstance(keys[name], list)
    } == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 0,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_pattern_is_named_as_llama_cpp_names_it(pre: str) -> None:
    tokenizer = make_tokenizer(PATTERNS[pre], ignore_merges=pre == "llama-bpe")
    assert tokenizer_keys(tokenizer, config_of(tokenizer))["tokenizer.ggml.pre"] == pre


def test_a_token_that_begins_each_text_is_asked_for() -> None:
    tokenizer = make_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(f"{END} $A", special_tokens=[(END, 0)])
    keys = tokenizer_keys(tokenizer, config_of(tokenizer))
    assert [keys[f"tokenizer.ggml.add_{which}_token"] for which in ("bos", "eos")] == [True, False]


def change(name: str) -> Tokenizer:
    """A tokenizer that differs from ours in one thing."""
    tokenizer = make_tokenizer(ignore_merges=name == "ignore_merges")
    match name:
        case "unigram":
            tokenizer = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
        case "merges":
            vocabulary = {letter: number for number, letter in enumerate(sorted(gpt2.alphabet()))}
            tokenizer = Tokenizer(models.BPE(vocabulary, []))
            tokenizer.pre_tokenizer, tokenizer.decoder = gpt2, decoders.ByteLevel()
            tokenizer.add_special_tokens([END])
        case "normalizer":
            tokenizer.normalizer = normalizers.Lowercase()
        case "pattern":
            tokenizer.pre_tokenizer = by(r"\w+|\W+")
        case "no pattern":
            tokenizer.pre_tokenizer = whole
        case "prefix space":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        case "around":
            tokenizer.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", 65)])
        case "strips":
            from tokenizers import AddedToken

            tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unigram", "Unigram"),
        ("merges", "has no merges, only single bytes"),
        ("normalizer", "Lowercase"),
        ("pattern", "cuts words"),
        ("no pattern", "cuts words"),
        ("prefix space", "cuts words"),
        ("around", "around a text"),
        ("strips", "'<mask>' with lstrip"),
        ("ignore_merges", "ignore_merges=True"),
    ],
)
def test_what_llama_cpp_would_do_in_another_way_is_refused(name: str, said: str) -> None:
    tokenizer = change(name)
    with pytest.raises(NestlingError, match=r"--format hf") as error:
        tokenizer_keys(tokenizer, config_of(tokenizer))
    assert said in str(error.value)


def without_bytes(unk_token: str | None) -> Tokenizer:
    """A tokenizer of all bytes but two, which no text in English has."""
    letters = [letter for byte, letter in byte_letters().items() if byte not in (0xFE, 0xFF)]
    vocab = {letter: number for number, letter in enumerate([END, *letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def test_bytes_without_a_token_are_named_and_the_file_is_written() -> None:
    assert sorted(byte_letters().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = without_bytes(END)
    assert missing_bytes(tokenizer) == [0xFE, 0xFF]
    assert tokenizer_keys(tokenizer, config_of(tokenizer))["tokenizer.ggml.pre"] == "gpt-2"
    assert missing_bytes(without_bytes(None)) == []  # both leave such bytes out
    assert missing_bytes(make_tokenizer()) == []


def test_a_model_that_names_no_end_of_text_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(NestlingError, match="eos_token_id"):
        tokenizer_keys(tokenizer, config_of(tokenizer, eos_token_id=None))


def test_a_normalizer_of_unicode_is_told_of_and_not_refused() -> None:
    tokenizer = make_tokenizer()
    assert differs_on(tokenizer) is None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer_keys(tokenizer, config_of(tokenizer))
    assert "NFC" in str(differs_on(tokenizer))


def test_a_chat_template_is_found_in_a_file_or_in_the_settings(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"chat_template": "one"}')
    assert read_chat_template(tmp_path) == "one"
    settings.write_text('{"chat_template": [{"name": "default", "template": "two"}]}')
    assert read_chat_template(tmp_path) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert read_chat_template(tmp_path) == "three"


@pytest.mark.skipif(not is_installed(), reason="needs the extra `llama`")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("pre", PATTERNS)
def test_llama_cpp_cuts_text_into_our_tokens_and_puts_it_together_again(pre: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(PATTERNS[pre], ignore_merges=pre == "llama-bpe")
    config = config_of(tokenizer)
    keys = tokenizer_keys(tokenizer, config)
    path = write_gguf(ElasticLM(config), tmp_path / "m.gguf", dtype="fp32", metadata=keys)
    llama = open_llama(path, 8, vocab_only=True)
    for text in [*make_texts(), f"{END}one{END} two"]:
        ids = tokenizer.encode(text).ids
        assert llama.tokenize(text.encode(), special=True) == ids
        assert b"".join(llama.detokenize([token_id], special=True) for token_id in ids) == text.encode()
    assert llama.token_eos() == 0


@torch.no_grad()
def test_the_file_holds_the_keys(tmp_path: Path) -> None:
    import gguf

    tokenizer = make_tokenizer()
    config = config_of(tokenizer)
    keys = tokenizer_keys(tokenizer, config, chat_template="{{ messages }}")
    path = write_gguf(ElasticLM(config), tmp_path / "m.gguf", dtype="fp32", metadata=keys)
    fields = gguf.GGUFReader(path).fields
    assert {key: fields[key].contents() for key in keys} == keys
