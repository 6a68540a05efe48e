"""The tokenizer of a GGUF file, made again as one of the library `tokenizers`.

gpt2     byte-level BPE; the file names the pattern that cuts words
llama    SentencePiece BPE with byte fallback; merges follow from the scores of the pieces
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from models.base.errors import NestlingError
from models.checkpoint.gguf_tokenizer import (
    CONTROL,
    DIGITS,
    GPT2,
    IGNORES_MERGES,
    NORMAL,
    PATTERNS,
    UNUSED,
    USER_DEFINED,
)

_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_COMPOSED = ("qwen2",)  # whose tokenizers compose characters first (Unicode NFC), which the file does not say
_SPACE = "▁"
_UNKNOWN = 2


def read_tokenizer(path: Path, keys: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that a file's keys describe; None where it has none.

    Raises:
        NestlingError: naming the kind or the key that is not supported.
    """
    kind = keys.get("tokenizer.ggml.model", "no_vocab")
    if kind in ("no_vocab", "none"):
        return None
    texts = _listed(path, keys, "tokens")
    kinds = keys.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    if not isinstance(kinds, list) or len(kinds) != len(texts):
        raise NestlingError(f"{path} has other tokenizer.ggml.token_type than tokens; fetch the file again")
    if kind == "gpt2":
        tokenizer = _byte_level(path, keys, texts, kinds)
    elif kind == "llama":
        tokenizer = _sentence_piece(path, keys, texts, kinds)
    else:
        raise NestlingError(
            f"{path} has a tokenizer of the kind {kind!r}; gpt2 and llama are supported: take another file"
        )
    added = [
        AddedToken(text, special=kind != USER_DEFINED, normalized=False)
        for text, kind in zip(texts, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_tokens(added)
    _add_around(tokenizer, keys, texts)
    return tokenizer


def _listed(path: Path, keys: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of texts that no such tokenizer lacks."""
    texts = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise NestlingError(f"{path} has no tokenizer.ggml.{name}, a list of texts; fetch the file again")
    return texts


def _byte_level(path: Path, keys: Mapping[str, Any], texts: list[str], kinds: list[int]) -> Tokenizer:
    named = str(keys.get("tokenizer.ggml.pre", "default"))
    pre = _ALIASES.get(named, named)
    steps = next((steps for steps, name in PATTERNS.items() if name == pre), None)
    if steps is None:
        known = ", ".join([*PATTERNS.values(), *_ALIASES])
        raise NestlingError(
            f"{path} cuts words by the pattern {named!r}; {known} are supported: take another file"
        )
    vocab = {text: token for token, text in enumerate(texts) if kinds[token] != UNUSED}
    pairs = [merge.partition(" ") for merge in _listed(path, keys, "merges")]
    merges = [(first, second) for first, _, second in pairs]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == IGNORES_MERGES))
    parts = [_step(pattern) for pattern in steps]
    if steps[-1] != GPT2:  # whose step turns words into letters for bytes as well
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _step(pattern: str) -> Any:
    if pattern == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    if pattern == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _sentence_piece(path: Path, keys: Mapping[str, Any], texts: list[str], kinds: list[int]) -> Tokenizer:
    scores = keys.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise NestlingError(f"{path} has no tokenizer.ggml.scores for its pieces; fetch the file again")
    vocab = {text: token for token, text in enumerate(texts)}
    unknown = next((text for text, kind in zip(texts, kinds, strict=True) if kind == _UNKNOWN), None)
    merges = _merges(texts, kinds, scores, vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(_SPACE)] if keys.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(
    texts: list[str], kinds: list[int], scores: list[float], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece joins, best first: by the score of the piece they make."""
    ordered = sorted(
        (token for token, kind in enumerate(kinds) if kind == NORMAL), key=lambda token: -scores[token]
    )
    normal = {texts[token] for token in ordered}
    merges = []
    for token in ordered:
        text = texts[token]
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def _add_around(tokenizer: Tokenizer, keys: Mapping[str, Any], texts: list[str]) -> None:
    """Let a text begin and end with the tokens that the file asks for."""
    sentence_piece = keys["tokenizer.ggml.model"] == "llama"
    begins = sentence_piece or keys.get("tokenizer.ggml.pre") == IGNORES_MERGES  # as llama.cpp assumes
    around: list[tuple[str, int] | None] = []
    for role, default in (("bos", begins), ("eos", False)):
        token = keys.get(f"tokenizer.ggml.{role}_token_id")
        wanted = keys.get(f"tokenizer.ggml.add_{role}_token", default)
        around.append((texts[token], token) if wanted and token is not None else None)
    first, last = around
    if first or last:
        single = " ".join([*([first[0]] if first else []), "$A", *([last[0]] if last else [])])
        tokenizer.post_processor = processors.TemplateProcessing(
            single, special_tokens=[one for one in dict.fromkeys(around) if one]
        )
