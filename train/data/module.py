"""The data of a run for Lightning: corpus, tokenizer, tokens, and the batches of any step.

`prepare()` does all the work and runs before the model is made, which needs the vocabulary. A second
run on the same content finds tokenizer and tokens in the cache.
"""

import itertools
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.base.files import default_cache_dir
from models.base.labels import IGNORE_INDEX
from train.data.cache import build_once, content_key
from train.data.conversations import ANSWERS, ChatFormat, load_chat
from train.data.corpus import Corpus, open_corpus, take_documents
from train.data.documents import is_validation, sample_documents
from train.data.loader import StepLoader, one_pass
from train.data.pack import Rows, hold_out_tail
from train.data.tokenizer import SAMPLE_CHARS, TextTokenizer, load_tokenizer, train_bpe
from train.data.tokens import Tokens, tokenize
from train.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


class TextData(pl.LightningDataModule):
    """Text as batches, for training from any step and for validation.

    Args:
        recipe: its `data`, `seed`, `model.from`, `loss.teacher` and the batch sizes of `trainer` are read.
        first_step: steps that are done already.
        first_row: the place of the first row that it reads there; see `StepLoader`.

    After `prepare()`:
        text_tokenizer: the tokenizer with its end token.
        train_rows, valid_rows: the packed text; `valid_rows` is empty if nothing was held out.
        chat: how conversations are written; None where the documents are texts.
        provenance: where the text came from, its licence, hashes and counts; JSON can hold it.
    """

    text_tokenizer: TextTokenizer
    chat: ChatFormat | None
    train_rows: Rows
    valid_rows: Rows
    provenance: dict[str, Any]
    tokens_sha256: str
    """Hash of everything that the run trains and validates on."""

    def __init__(self, recipe: Recipe, *, first_step: int = 0, first_row: int | None = None) -> None:
        super().__init__()
        self.recipe = recipe
        self.config = recipe.data
        self.first_step = first_step
        self.first_row = first_row
        self.cache_dir = cache_folder(recipe.data.cache_dir)
        self.console: Console | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The bare tokenizer, as model folders hold it."""
        return self.text_tokenizer.backend

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.text_tokenizer.vocab_size

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a document, and stands before the next."""
        return self.text_tokenizer.eos_token_id

    def prepare(self, console: Console | None = None) -> "TextData":
        """Read, tokenize and pack, or open what an earlier run left; return itself.

        Args:
            console: for progress.

        Raises:
            UsageError: if a setting names something that is not there.
            NestlingError: if a file cannot be read, or there is no text.
        """
        self.console = console
        config = self.config
        corpus = self._open(config.source, "data.source")
        self.text_tokenizer = self._make_tokenizer(corpus)
        self.chat = open_chat(self.recipe, self.text_tokenizer)
        tokens = self._tokenize(corpus, "data.source", self._fraction, config.max_documents)
        train, valid, held_out_tokens = tokens.train, tokens.valid, ""
        train_labels, valid_labels = tokens.train_labels, tokens.valid_labels
        held_out = f"{self._fraction:g} of the documents, by hash of their text"
        if config.valid:
            own = self._tokenize(self._open(config.valid, "data.valid"), "data.valid")
            valid, valid_labels, held_out_tokens = own.train, own.train_labels, own.sha256
            held_out = config.valid
        elif min(len(train), len(valid)) == 1:  # one side holds only its leading eos
            held_out = f"the last {self._fraction:g} of the tokens, for want of documents"
            logger.warning("data.valid_fraction: validation is %s", held_out)
            is_train = len(train) > 1
            train, valid = hold_out_tail(train if is_train else valid, self._fraction)
            labels = train_labels if is_train else valid_labels
            if labels is not None:
                train_labels, valid_labels = hold_out_tail(labels, self._fraction)
        self.tokens_sha256 = content_key(tokens.sha256, held_out_tokens, self.eos_token_id)
        length = config.sequence_length
        self.train_rows = Rows(stream=train, sequence_length=length, is_label=train_labels)
        self.valid_rows = Rows(stream=valid, sequence_length=length, is_label=valid_labels)
        learned = {config.source: self.train_rows}
        if config.valid:
            learned[config.valid] = self.valid_rows
        for source, rows in learned.items():
            if not rows.num_labels and config.messages_field:
                raise NestlingError(
                    f"data.messages_field={config.messages_field}: no answer in {source}, that is no "
                    f"message of the role {ANSWERS}; give conversations that hold some"
                )
        self.provenance = self._describe(corpus, tokens, held_out)
        return self

    def train_dataloader(self, *, divided: bool = True) -> StepLoader:
        """Return the micro-batches from `first_step` on, as this process sees them, or undivided."""
        rank, world_size = 0, 1
        if divided and self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return StepLoader(
            rows=self.train_rows,
            batch_size=self.recipe.trainer.batch_size,
            accumulate=self.recipe.trainer.accumulate_grad_batches,
            seed=self.recipe.seed,
            num_steps=self.recipe.trainer.max_steps,
            start_step=self.first_step,
            first_row=self.first_row,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.num_workers,
        )

    def row_at(self, step: int) -> int:
        """Return the index of the first row that a step reads, counted over all epochs."""
        size = self.recipe.trainer.rows_per_step
        first = self.first_step * size if self.first_row is None else self.first_row
        return first + (step - self.first_step) * size

    def validation_batches(self, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the same tokens_BT and labels_BT every time, drawn from all over the validation text.

        Args:
            limit: the largest number of batches; each held-out row comes at most once.
        """
        if len(self.valid_rows) == 0:
            return []
        loader = one_pass(self.valid_rows, batch_size=self.recipe.trainer.batch_size)
        batches = ((batch.tokens_BT, batch.labels_BT) for batch in loader)
        # of conversations, a batch may hold questions alone, which tell nothing
        told = (batch for batch in batches if (batch[1] != IGNORE_INDEX).any())
        return list(itertools.islice(told, limit))

    @property
    def _fraction(self) -> float:
        return 0.0 if self.config.valid else self.config.valid_fraction

    def _open(self, source: str, key: str) -> Corpus:
        return open_corpus(
            source,
            text_field=self.config.text_field,
            separator=self.config.separator,
            cache_dir=self.cache_dir,
            key=key,
            messages_field=self.config.messages_field,
        )

    def _tokenize(
        self, corpus: Corpus, key: str, valid_fraction: float = 0.0, limit: int | None = None
    ) -> Tokens:
        return tokenize(
            corpus,
            self.text_tokenizer,
            cache_dir=self.cache_dir,
            valid_fraction=valid_fraction,
            max_documents=limit,
            console=self.console,
            key=key,
            chat=self.chat,
        )

    def _make_tokenizer(self, corpus: Corpus) -> TextTokenizer:
        config, fraction = self.config, self._fraction
        if setting := tokenizer_setting(self.recipe):
            key, path = setting
            return load_tokenizer(path, key=key)

        def build(partial: Path) -> dict[str, Any]:
            documents = take_documents(corpus, config.max_documents)
            sample = sample_documents(
                (text for text in documents if not is_validation(text, fraction)), SAMPLE_CHARS
            )
            shown = self.console is not None and self.console.is_terminal
            trained = train_bpe(sample, vocab_size=config.vocab_size, progress=shown)
            trained.save(partial)
            return {"vocab_size": trained.vocab_size, "sampled_chars": sum(map(len, sample))}

        name = content_key(
            corpus.fingerprint, config.vocab_size, fraction, config.max_documents, SAMPLE_CHARS
        )
        build_once(self.cache_dir / f"tokenizer-{name}", build)
        return load_tokenizer(str(self.cache_dir / f"tokenizer-{name}")).named("bpe")

    def _describe(self, corpus: Corpus, tokens: Tokens, held_out: str) -> dict[str, Any]:
        return {
            "source": corpus.source,
            "licence": corpus.licence,
            "sha256": corpus.fingerprint,
            "num_skipped_files": corpus.num_skipped,
            "validation": held_out,
            **tokens.facts,
            "num_train_tokens": self.train_rows.num_labels,
            "num_valid_tokens": self.valid_rows.num_labels,
            "tokenizer": {
                "name": self.text_tokenizer.name,
                "vocab_size": self.text_tokenizer.vocab_size,
                "sha256": self.text_tokenizer.sha256,
            },
        }


def tokenizer_setting(recipe: Recipe) -> tuple[str, str] | None:
    """Return key and value of the setting that names the tokenizer; None: it is trained."""
    if recipe.data.tokenizer != "bpe":
        return "data.tokenizer", recipe.data.tokenizer
    shared = {"model.from": recipe.model.from_, "loss.teacher": recipe.loss.teacher}
    return next(((key, path) for key, path in shared.items() if path is not None), None)


def open_chat(recipe: Recipe, tokenizer: TextTokenizer | None = None) -> ChatFormat | None:
    """Return how conversations are written; None where the documents are texts.

    Args:
        recipe: The run.
        tokenizer: The tokenizer, where it has been read already.

    Raises:
        UsageError: if the documents are conversations and no chat template is there.
    """
    if recipe.data.messages_field is None:
        return None
    setting = tokenizer_setting(recipe)
    if setting is None:
        raise UsageError(
            f"data.messages_field={recipe.data.messages_field}: needs a chat template; set model.from or "
            "data.tokenizer to a folder that has one"
        )
    key, path = setting
    return load_chat(path, tokenizer or load_tokenizer(path, key=key), key=key)


def cache_folder(configured: str | None) -> Path:
    """Return the folder of `data.cache_dir`, or `data/` in the user's cache of nestling."""
    if configured is not None:
        return Path(configured).expanduser()
    return default_cache_dir() / "data"
