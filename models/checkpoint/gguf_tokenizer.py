"""A byte-level BPE as the keys of a GGUF file, so that llama.cpp cuts text into the very same tokens.

The file names the pattern that cuts words (`tokenizer.ggml.pre`) and llama.cpp has it built in, so that
only tokenizers whose pattern it knows can be written. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md,
names of patterns: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp. Two differences
are left: characters that only tables of Unicode after 14.0 know, and, in the patterns of Llama 3 and Qwen, a
long s after an apostrophe, which is an s there for us and not for llama.cpp.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from models.base.errors import NestlingError
from models.elastic.config import ElasticConfig

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens: special ones are CONTROL, others that were added to the vocabulary USER_DEFINED."""

DIGITS = "digits"  # each digit by itself
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + number
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for number in (r"\p{N}{1,3}", r"\p{N}")
)
PATTERNS = {(GPT2,): "gpt-2", (DIGITS, GPT2): "smollm", (_LLAMA3,): "llama-bpe", (_QWEN2,): "qwen2"}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""llama.cpp ends a text at each of them."""
IGNORES_MERGES = "llama-bpe"  # a word that is a token is that token, whatever its merges would give


def tokenizer_keys(
    tokenizer: Tokenizer, config: ElasticConfig, *, chat_template: str | None = None
) -> dict[str, Any]:
    """Return the keys of a GGUF file that describe a tokenizer: key -> text, number, truth value or list.

    Args:
        tokenizer: a byte-level BPE.
        config: the model's, whose vocabulary may be larger and which names the token that ends a text.
        chat_template: Jinja, if the model has one.

    Raises:
        NestlingError: naming what in the tokenizer llama.cpp would do in another way.
    """
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    pre = _check(state)
    eos = config.first_eos_token_id
    if eos is None:
        raise NestlingError(
            "config.json has no eos_token_id, and llama.cpp would end a text at a token of its own choice; "
            "set the one that ends a text"
        )
    if len(config.eos_token_ids) > len(ENDS):
        raise _refusal(f"ends a text at {len(config.eos_token_ids)} tokens")
    bos = eos if config.bos_token_id is None else config.bos_token_id
    added = {token["id"]: token for token in state["added_tokens"]}
    names = {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    add_bos, add_eos = _added_around(tokenizer, bos, eos)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [names.get(token_id, f"[PAD{token_id}]") for token_id in range(config.vocab_size)],
        "token_type": [_type(token_id, names, added) for token_id in range(config.vocab_size)],
        "merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]
        ],
        "bos_token_id": bos,
        **dict(zip(ENDS, config.eos_token_ids, strict=False)),
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    }
    template = {} if chat_template is None else {"tokenizer.chat_template": chat_template}
    return {**{f"tokenizer.ggml.{name}": value for name, value in keys.items()}, **template}


def differs_on(tokenizer: Tokenizer) -> str | None:
    """Return texts on which llama.cpp, which never normalises, gives other tokens than this tokenizer."""
    return None if tokenizer.normalizer is None else "text that Unicode's NFC would change"


def _check(state: Mapping[str, Any]) -> str:
    """Return the name of the pattern that cuts words; NestlingError unless all else is plain BPE."""
    model, normalizer = state["model"], state["normalizer"]
    if model["type"] != "BPE" or _kind(state["decoder"]) != "ByteLevel":
        raise _refusal(f"is no byte-level BPE (model {model['type']}, decoder {_kind(state['decoder'])})")
    _check_vocabulary(model)
    if _kind(normalizer) not in ("None", "NFC"):
        raise _refusal(f"normalises text ({_kind(normalizer)})")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(f"has {name}={model[name]!r}")
    for token in state["added_tokens"]:
        flags = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if flags:
            raise _refusal(f"has the token {token['content']!r} with {flags[0]}")
    pre = PATTERNS.get(_steps(state["pre_tokenizer"]))
    if pre is None:
        raise _refusal(f"cuts words in a way that is not one of {', '.join(PATTERNS.values())}")
    if bool(model.get("ignore_merges")) != (pre == IGNORES_MERGES):
        raise _refusal(f"has ignore_merges={bool(model.get('ignore_merges'))} with the pattern of {pre}")
    return pre


def missing_bytes(tokenizer: Tokenizer) -> list[int]:
    """Return the bytes that have no token: on a text with one of them llama.cpp gives other tokens.

    It leaves such a byte out; where there is a token for what is unknown, transformers puts that.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_token") is None:  # without one both leave such bytes out
        return []
    return sorted(byte for byte, letter in byte_letters().items() if letter not in model["vocab"])


def byte_letters() -> dict[int, str]:
    """Return the letter that stands for each byte in a byte-level vocabulary (GPT-2's).

    >>> byte_letters()[ord("a")], byte_letters()[ord(" ")]
    ('a', 'Ġ')
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _check_vocabulary(model: Mapping[str, Any]) -> None:
    if not model["merges"]:  # an empty list has no type of its own there
        raise _refusal("has no merges, only single bytes")


def _refusal(what: str) -> NestlingError:
    return NestlingError(f"the tokenizer {what}, which a GGUF file cannot say exactly; use --format hf")


def _kind(part: Mapping[str, Any] | None) -> str:
    return "None" if part is None else str(part["type"])


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the patterns by which words are cut, one after the other; empty for an unknown one."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    steps: list[str] = []
    for part in parts:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                steps += [GPT2] if use_regex else []
            case {"type": "Digits", "individual_digits": True}:
                steps.append(DIGITS)
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                steps.append(regex)
            case _:
                return ()
    return tuple(steps) if _kind(parts[-1]) == "ByteLevel" else ()


def _type(token_id: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if token_id in added:
        return CONTROL if added[token_id]["special"] else USER_DEFINED
    return NORMAL if token_id in names else UNUSED


def _added_around(tokenizer: Tokenizer, bos: int, eos: int) -> tuple[bool, bool]:
    """Return whether a text gets the token that begins one, and the one that ends one."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [bos] * add_bos + plain + [eos] * add_eos:
            return add_bos, add_eos
    raise _refusal(f"puts other tokens around a text than {bos} before and {eos} after it")
