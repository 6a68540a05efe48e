"""Tokenizers: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.

Byte-level BPE (GPT-2) starts from the 256 bytes, so every text has tokens and comes back exactly;
there is no unknown token. The words are cut by GPT-2's own pattern, which every runtime knows.
`<|endoftext|>` is the one special token: it ends a document, and so it also stands before the next.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.base.errors import NestlingError, UsageError
from models.base.files import read_json, write_json, write_text
from models.checkpoint.gguf_read import is_gguf, read_gguf_tokenizer
from models.checkpoint.tokenizer import SETTINGS, for_bare_text, open_tokenizer, token_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
COMMON_END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[EOS]")
SMALLEST_VOCABULARY = 257
MIXED_TEXT = "Once upon a time, 12 cats' eyes\n\n\tlit up:  naïve Ωμέγα, 日本語 🙂 don't!<|x|>\n"
"""A text of many kinds, by which two tokenizers are compared."""
LONG_WORD_CHARS = 1000
LONG_WORD = re.compile(rf"\S{{{LONG_WORD_CHARS}}}|\s{{{LONG_WORD_CHARS}}}")
SAMPLE_CHARS = 20_000_000
"""More text than this hardly changes a vocabulary, and costs time."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer and the token that ends a document.

    Args:
        backend: the tokenizer itself.
        eos_token: ends a document.
        name: a file, a name on the hub, or bpe.
    """

    backend: Tokenizer
    eos_token: str
    name: str

    @property
    def vocab_size(self) -> int:
        """Number of ids, holes included: the highest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a document."""
        token_id: int | None = self.backend.token_to_id(self.eos_token)
        assert token_id is not None, self.eos_token
        return token_id

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def named(self, name: str) -> "TextTokenizer":
        """Return the same tokenizer under another name."""
        return replace(self, name=name)

    def save(self, folder: Path, *, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json` and a `tokenizer_config.json` that `AutoTokenizer` loads."""
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        write_json(folder / "tokenizer_config.json", config)


def train_bpe(texts: Iterable[str], *, vocab_size: int, progress: bool = False) -> TextTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer, whatever the threads.

    Args:
        texts: texts to learn from; the caller bounds it (`sample_documents`).
        vocab_size: ids wanted; a small corpus may have fewer merges to give.
        progress: whether to show bars.

    Raises:
        UsageError: if not even the bytes and the end of text fit.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"data.vocab_size={vocab_size}: 256 bytes and {END_OF_TEXT} need at least {SMALLEST_VOCABULARY}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    parts = (part for text in texts for part in cut_long_words(text))
    interruptible(lambda: backend.train_from_iterator(parts, trainer=trainer))
    return TextTokenizer(backend=backend, eos_token=END_OF_TEXT, name="bpe")


def cut_long_words(text: str) -> Iterator[str]:
    """Cut runs without a border, as of NULs, blanks or DNA: merging takes the square of a word's length.

    Texts without such runs, which is nearly all, stay as they are.

    >>> [len(part) for part in cut_long_words("a b " + "ACGT" * 500 + " c")]
    [1004, 1000, 2]
    """
    if not LONG_WORD.search(text):
        yield text
        return
    start = 0
    for found in LONG_WORD.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]


def interruptible(work: Callable[[], object]) -> None:
    """Do long work outside Python so that a signal is heard at once: this thread only waits."""
    failed: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again where it is heard
            failed.append(error)

    worker = threading.Thread(target=do, daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(0.05)
    if failed:
        raise failed[0]


def load_tokenizer(source: str, *, key: str = "data.tokenizer") -> TextTokenizer:
    """Load a Hugging Face tokenizer.

    Args:
        source: a tokenizer.json, a folder with one, a GGUF file, any folder that transformers can read,
            or a name on the hub.
        key: name in errors of the setting.

    Raises:
        UsageError: if there is none, or none that `tokenizers` can run.
        NestlingError: if its file is damaged.
    """
    path = Path(source).expanduser()
    if is_gguf(path):
        return _from_gguf(path, source, key)
    if path.is_file():
        return _from_file(path, source, key)
    if (path / "tokenizer.json").is_file():
        return _from_file(path / "tokenizer.json", source, key)
    theirs = _from_transformers(source, key)
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{key}={source!r}: a tokenizer without tokenizer.json; give one that has it, or bpe"
        )
    return _checked(backend, theirs.eos_token, source, key)


def _from_gguf(path: Path, source: str, key: str) -> TextTokenizer:
    file = read_gguf_tokenizer(path)
    if file.tokenizer is None:
        raise UsageError(f"{key}={source!r}: a GGUF file without a tokenizer; give one that has it")
    return _checked(file.tokenizer, file.eos_token, source, key)


def _from_file(path: Path, source: str, key: str) -> TextTokenizer:
    try:
        backend = open_tokenizer(path)
    except NestlingError as error:
        raise NestlingError(f"{key}={source!r}: {error}") from None
    config_path = path.with_name(SETTINGS)
    eos = read_json(config_path).get("eos_token") if config_path.is_file() else None
    return _checked(backend, token_name(eos), source, key)


def _from_transformers(source: str, key: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"{key}={source!r}: no tokenizer there ({reason}); "
            "give bpe, a tokenizer.json, a model folder or a name on the hub"
        ) from error


def _checked(backend: Tokenizer, eos: str | None, source: str, key: str) -> TextTokenizer:
    """Find the end token: the one configured, else the first common one that exists."""
    for token in [eos] if eos else COMMON_END_TOKENS:
        if backend.token_to_id(token) is not None:
            return TextTokenizer(backend=for_bare_text(backend), eos_token=token, name=source)
    raise UsageError(
        f"{key}={source!r}: no token that ends a text (looked for "
        f"{eos or ', '.join(COMMON_END_TOKENS)}); set eos_token in its tokenizer_config.json"
    )
