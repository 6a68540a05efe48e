"""A cache of what a teacher says about the training text: made once, used by many runs.

    cache.json      what it was made from: teacher, tokenizer, text, row length, form; written first
    00000.bin ...   records of some rows, T a row, read through a memory map; each whole or absent
    shards.json     size and hash of each

A shard is a function of the teacher and its rows: a cache that was killed goes on with the next one, and its
bytes are those of one that was not. A shard that is cut short or damaged is named and made again.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.base.files import (
    LOCK,
    check_replaceable,
    make_folder,
    read_json,
    sweep,
    write_file,
    write_json,
)
from models.base.progress import progress_bar
from train.data.batch import Batch
from train.data.cache import seal
from train.data.module import TextData
from train.data.pack import Rows
from train.distill.forms import Form, Records
from train.objective.chunked_loss import rows_per_chunk
from train.objective.positions import Index, rows_of
from train.objective.teacher import LogitTeacher, Targets
from train.recipe.sections import LossConfig

FILE = "cache.json"
SHARDS = "shards.json"
SHARD_TOKENS = 2**16
SHARD_BYTES = 2**26
"""A shard holds at most this much: what a kill can cost."""
NAMES = {
    "teacher": "loss.teacher",
    "config": "config.json of loss.teacher",
    "tokenizer": "data.tokenizer",
    "text": "data.source",
    "sequence_length": "data.sequence_length",
    "form": "distill.form",
    "k": "distill.k",
    "dtype": "distill.dtype",
    "temperature": "loss.temperature",
}
"""What a cache was made from, and the setting that names each."""


class Source(Protocol):
    """Whoever can tell the records of rows: a model, or a server."""

    def records(self, tokens_BT: Tensor, uniform_BT: NDArray[np.float64]) -> Records:
        """Return the records [B, T] of some rows, one random number for each position."""
        ...


class CachedTeacher:
    """A teacher whose words are read from a folder.

    Args:
        folder: the cache.
        form: how it keeps them.
        record: see `Teacher`; that of the teacher itself.
        facts: more that the cache depends on, by the names of `NAMES`.
        open_source: opens the teacher, if something is missing in the cache.
        batch_size: rows that it reads at once.
    """

    def __init__(
        self,
        folder: Path,
        form: Form,
        record: Mapping[str, str],
        facts: Mapping[str, Any],
        open_source: Callable[[], Source],
        *,
        batch_size: int,
    ) -> None:
        self.folder, self.form, self.facts = folder, form, dict(facts)
        self.record = dict(record)
        self.open_source = open_source
        self.batch_size = batch_size
        self.maps: list[Records] = []
        self.rows_per_shard = 1

    def place(self, device: torch.device) -> None:
        """See `Teacher`; records go where the student's logits are."""

    def prepare(self, data: TextData, console: Console | None) -> None:
        """Make what is missing of the cache of a run's rows, and open it.

        Raises:
            UsageError: if the folder holds the cache of another teacher or text, or something else.
            NestlingError: if the disk refuses or the teacher fails; what was made stays.
        """
        rows = data.train_rows
        made_from = {
            "teacher": self.record["sha256"],
            "tokenizer": data.text_tokenizer.sha256,
            "text": hashlib.sha256(np.ascontiguousarray(rows.stream).data).hexdigest(),
            "sequence_length": rows.sequence_length,
            **self.facts,
        }
        shown = f"distill.cache={self.folder}"
        try:
            check_replaceable(self.folder, marker=FILE)
            make_folder(self.folder)
            lock = self._lock(console, shown)
        except OSError as error:
            raise UsageError(
                f"{shown}: cannot be written ({error.strerror}); choose another folder"
            ) from error
        except UsageError as error:
            raise UsageError(f"{shown}: {error}") from None
        try:
            self.rows_per_shard = self._check_made_from(made_from, shown) or self._most_rows(rows)
            kept = {"rows_per_shard": self.rows_per_shard}
            write_json(self.folder / FILE, {**self.record, **made_from, **kept})
            sweep(self.folder)
            self._fill(rows, console, shown)
        finally:
            lock.release()
        self.maps = [self._map(number, part) for number, part in enumerate(self._parts(rows))]

    def _lock(self, console: Console | None, shown: str) -> FileLock:
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            _tell(console, f"{shown}: another process is filling it; this one waits")
            lock.acquire()
        return lock

    def targets(self, batch: Batch) -> Targets:
        """See `Teacher`."""
        assert batch.row_ids_B is not None, "a cache is read by the rows' numbers"
        return _CachedTargets(self, batch.row_ids_B.cpu().numpy(), batch.tokens_BT.shape[1])

    def read(self, ids_B: NDArray[np.int64]) -> Records:
        """Return the records [B, T] of some rows; those past the end have no labels, and anything will do."""
        return np.stack([self._row(*divmod(int(row), self.rows_per_shard)) for row in ids_B])

    def _row(self, shard: int, row: int) -> Records:
        exists = shard < len(self.maps) and row < len(self.maps[shard])
        stored: Records = self.maps[shard][row] if exists else self.maps[0][0]
        return stored

    def _check_made_from(self, made_from: Mapping[str, Any], shown: str) -> int | None:
        """Return how many rows the shards that are there hold, whatever the batch size of this run."""
        if not (self.folder / FILE).is_file():
            return None
        theirs = read_json(self.folder / FILE)
        for name, now in made_from.items():
            if name == "config" and name not in theirs:  # an earlier release did not keep it
                continue
            if theirs.get(name) != now:
                before = _short(theirs.get(name))
                told = f" ({theirs.get('path')})" if name == "teacher" else ""
                raise UsageError(
                    f"{shown}: was made from another {NAMES[name]}: {before}{told}, now {_short(now)}; "
                    "choose another folder, or make it again there once that one is removed"
                )
        size = theirs.get("rows_per_shard")
        return size if isinstance(size, int) and size > 0 else None

    def _most_rows(self, rows: Rows) -> int:
        """Return how many rows a shard has; whole batches, so that products have the shapes of the run's."""
        size = min(SHARD_TOKENS // rows.sequence_length, SHARD_BYTES // self._row_bytes(rows))
        return max(1, size // self.batch_size) * self.batch_size

    def _parts(self, rows: Rows) -> list[range]:
        """Return the rows of each shard."""
        size = self.rows_per_shard
        return [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]

    def _row_bytes(self, rows: Rows) -> int:
        return self.form.dtype.itemsize * rows.sequence_length

    def _map(self, number: int, part: range) -> Records:
        path = self.folder / _name(number)
        stored = np.memmap(path, dtype=self.form.dtype, mode="r")
        return stored.reshape(len(part), -1)

    def _fill(self, rows: Rows, console: Console | None, shown: str) -> None:
        parts = self._parts(rows)
        seals = self._read_seals(console, shown)
        missing = list(self._missing(parts, self._row_bytes(rows), seals, console, shown))
        if not missing:
            return
        num_tokens = len(rows) * rows.sequence_length
        per_token = self.form.dtype.itemsize
        _tell(
            console,
            f"{shown}: {per_token:,} bytes a token, {num_tokens:,} tokens, {num_tokens * per_token:,} bytes; "
            f"{len(parts) - len(missing)} of {len(parts)} shards are there",
        )
        self._check_room(sum(len(parts[number]) for number in missing) * rows.sequence_length, shown)
        source = self.open_source()
        with progress_bar("asking the teacher", num_tokens, console=console) as bar:
            bar.advance(num_tokens - sum(len(parts[one]) for one in missing) * rows.sequence_length)
            for number in missing:
                path = self.folder / _name(number)
                with write_file(path) as partial, partial.open("wb") as file:
                    for ids_B in _batches(parts[number], self.batch_size):
                        tokens_BT, _ = rows.gather(ids_B)
                        file.write(source.records(tokens_BT, uniforms(ids_B, rows.sequence_length)).tobytes())
                        bar.advance(tokens_BT.numel())
                seals[path.name] = seal(path)
                write_json(self.folder / SHARDS, seals)

    def _read_seals(self, console: Console | None, shown: str) -> dict[str, Any]:
        """Return size and hash of each shard; of none if their file is damaged."""
        if not (self.folder / SHARDS).is_file():
            return {}
        try:
            return read_json(self.folder / SHARDS)
        except NestlingError:
            _tell(console, f"{shown}: {SHARDS} is damaged; all shards are made again")
            return {}

    def _missing(
        self,
        parts: list[range],
        row_bytes: int,
        seals: Mapping[str, Any],
        console: Console | None,
        shown: str,
    ) -> Iterator[int]:
        for number, part in enumerate(parts):
            path = self.folder / _name(number)
            if not path.is_file():
                yield number
            elif path.stat().st_size != len(part) * row_bytes or seal(path) != seals.get(path.name):
                _tell(console, f"{shown}: {path.name} is damaged; it is made again")
                yield number

    def _check_room(self, num_tokens: int, shown: str) -> None:
        needed, free = num_tokens * self.form.dtype.itemsize, shutil.disk_usage(self.folder).free
        if needed > free:
            raise NestlingError(
                f"{shown}: needs {needed:,} bytes and the disk has {free:,}; make room, choose another "
                "folder, a smaller distill.k, or fewer documents with data.max_documents"
            )


class ModelSource:
    """A model in memory that tells the records of rows."""

    def __init__(self, teacher: LogitTeacher, form: Form, device: torch.device) -> None:
        self.teacher, self.form, self.device = teacher, form, device
        teacher.place(device)

    def records(self, tokens_BT: Tensor, uniform_BT: NDArray[np.float64]) -> Records:
        """See `Source`."""
        targets, uniform_N = self.teacher.logits(tokens_BT.to(self.device)), uniform_BT.reshape(-1)
        size = rows_per_chunk(self.teacher.vocab_size, self.device)
        chunks = [slice(first, first + size) for first in range(0, tokens_BT.numel(), size)]
        chunks[-1] = slice(chunks[-1].start, tokens_BT.numel())
        return np.concatenate([self.form.encode(targets(here), uniform_N[here]) for here in chunks])


class _CachedTargets:
    def __init__(self, teacher: CachedTeacher, ids_B: NDArray[np.int64], num_positions: int) -> None:
        self.teacher, self.ids_B, self.num_positions = teacher, ids_B, num_positions

    def divergence(self, here: Index, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """See `Targets`."""
        each = rows_of(here, self.num_positions)
        if not each:
            return logits_NV.new_zeros(0)
        records = self.teacher.read(self.ids_B[[row for row, _ in each]])
        chosen = [records[row][part] for row, (_, part) in enumerate(each)]
        return self.teacher.form.divergence(np.concatenate(chosen), logits_NV, config)


def uniforms(ids_B: NDArray[np.int64], num_positions: int) -> NDArray[np.float64]:
    """Return random numbers below 1 for each position of some rows: a function of the row alone."""
    raw = [np.random.Philox(key=np.array([0, row], np.uint64)).random_raw(num_positions) for row in ids_B]
    return (np.stack(raw) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _batches(part: range, size: int) -> Iterator[NDArray[np.int64]]:
    for first in range(part.start, part.stop, size):
        yield np.arange(first, min(first + size, part.stop))


def _name(number: int) -> str:
    return f"{number:05d}.bin"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _tell(console: Console | None, line: str) -> None:
    if console is not None:
        console.print(line, markup=False, highlight=False)
