"""The receipt of an extraction: what was run when it was written, so that anyone can run it again anywhere.

    receipt.json   checks: what was compared, and how it came out
                   probe: prompts, their greedy continuations, and some logits
                   files: SHA-256 of each; versions of what ran

It stands in the folder, or beside a GGUF file as FILE.receipt.json. A folder's probe is of the member in
place, and is run again in transformers. A file rounds weights: its probe is of what it holds, as it opens
here in fp32, and how far that is from the member in place stands under `rounding`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.base.files import hash_files, naming, read_json, write_json
from models.checkpoint.folder import TOKENIZER, load_model
from models.checkpoint.huggingface import load_stock, load_stock_tokenizer

RECEIPT = "receipt.json"
FORMAT = 1
NUM_LOGITS = 16
"""Logits of the last position that a probe keeps, of each text."""
TOKENS = "tokens of texts"
TEXTS = (
    "Once upon a time, there was a little girl.",
    "def area(x):  # 12\n\treturn x**2\n",
    "naïve café — 日本語 \N{GRINNING FACE}",
    "  two  spaces\n\n\nand 3.14159 1,000 don't",
)
"""Texts that a tokenizer is compared on."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a member writes, and thinks.

    Args:
        num_prompt: tokens of a row that were given.
        ids: rows of tokens, continued greedily.
        logits: of the last position of each row, the first few.
        largest: largest logit of all positions, by which differences are measured.
        text_ids: tokens of `TEXTS`; empty without a tokenizer.
    """

    num_prompt: int
    ids: list[list[int]]
    logits: list[list[float]]
    largest: float
    text_ids: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison: what was compared, how much of it, and whether it holds."""

    check: str
    compared: int
    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """True if the value is within the bound."""
        return self.value <= self.bound


def make_probe(ids_BT: Tensor, logits_BTV: Tensor, num_prompt: int, tokenizer: Any) -> Probe:
    """Return the probe of a member from what it wrote; `tokenizer` is of `tokenizers`, or None."""
    return Probe(
        num_prompt=num_prompt,
        ids=ids_BT.tolist(),
        logits=logits_BTV[:, -1, :NUM_LOGITS].float().tolist(),
        largest=float(logits_BTV.abs().max()),
        text_ids=[] if tokenizer is None else [tokenizer.encode(text).ids for text in TEXTS],
    )


def receipt_path(place: Path) -> Path:
    """Return where the receipt of a folder or a GGUF file is.

    >>> str(receipt_path(Path("S.gguf")))
    'S.gguf.receipt.json'
    """
    return place / RECEIPT if place.is_dir() else place.with_name(f"{place.name}.{RECEIPT}")


def write_receipt(
    place: Path,
    probe: Probe,
    checks: Sequence[Check],
    *,
    source: Mapping[str, Any],
    card: Mapping[str, Any],
    rounding: Mapping[str, Any] | None = None,
) -> None:
    """Write the receipt of a folder whose other files are there, or of a file.

    Args:
        place: the extraction.
        probe: see this file's docstring.
        checks: what was compared.
        source: where it comes from.
        card: commit, versions, hardware, date.
        rounding: how far it is from the member in place.
    """
    fields = {
        "format": FORMAT,
        "source": dict(source),
        "checks": [asdict(check) | {"holds": check.holds} for check in checks],
        **({} if rounding is None else {"rounding": dict(rounding)}),
        "probe": asdict(probe),
        "files": {path.name: hash_files(path) for path in _files(place)},
        "card": dict(card),
    }
    write_json(receipt_path(place), fields)


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    return sorted(path for path in place.iterdir() if path.is_file() and path.name != RECEIPT)


def read_receipt(place: Path) -> dict[str, Any]:
    """Return the receipt of a folder or a file.

    Raises:
        NestlingError: if it is missing or damaged.
    """
    path = receipt_path(place)
    fields = read_json(path)
    with naming(path):
        files = fields.get("files")
        if fields.get("format") != FORMAT or not isinstance(files, dict):
            raise NestlingError("it is no receipt that this release reads; extract the member again")
        if any(Path(name).name != name for name in files):
            raise NestlingError("it names files outside of its folder; extract the member again")
        try:
            _check_probe(Probe(**fields["probe"]))
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
            raise NestlingError("its probe is damaged; extract the member again") from None
    return fields


def _check_probe(probe: Probe) -> None:
    """Raise ValueError, or torch's own errors, for what is no probe."""
    ids_BT, logits_BV = torch.tensor(probe.ids), torch.tensor(probe.logits)
    num_prompt: Any = probe.num_prompt  # a file may say anything
    whole = isinstance(num_prompt, int) and ids_BT.dtype == torch.int64 and bool((ids_BT >= 0).all())
    if not whole or ids_BT.ndim != 2 or not 0 < num_prompt <= ids_BT.shape[1]:
        raise ValueError("ids")
    if logits_BV.shape[0] != ids_BT.shape[0] or not 0 < float(probe.largest) < float("inf"):
        raise ValueError("logits")
    text_ids: Any = probe.text_ids
    if not isinstance(text_ids, list) or (text_ids and len(text_ids) != len(TEXTS)):
        raise ValueError("text_ids")


@torch.no_grad()
def repeat_receipt(place: Path, tolerance: float) -> list[Check]:
    """Compare an extraction with its receipt: files, greedy ids and logits, tokens of texts.

    Args:
        place: the extraction; a folder runs in transformers, a GGUF file here in fp32.
        tolerance: how far logits may be off, relative to the largest.

    Raises:
        NestlingError: if the receipt is damaged, or the extraction does not open.
    """
    fields, beside = read_receipt(place), place if place.is_dir() else place.parent
    probe = Probe(**fields["probe"])
    changed = [
        name
        for name, digest in fields["files"].items()
        if not (beside / name).is_file() or hash_files(beside / name) != digest
    ]
    checks = [Check(check="files", compared=len(fields["files"]), value=len(changed), bound=0)]
    logits_of, encode, vocab_size = _open_folder(place) if place.is_dir() else _open_file(place)
    with naming(receipt_path(place)):
        if max(map(max, probe.ids)) >= vocab_size:
            raise NestlingError("its probe is of another vocabulary; extract the member again")
        checks += _compare_probe(probe, logits_of(torch.tensor(probe.ids)), tolerance)
    if probe.text_ids:
        pairs = zip(TEXTS, probe.text_ids, strict=True)
        other = sum(encode(text) != expected for text, expected in pairs)
        checks.append(Check(check=TOKENS, compared=len(TEXTS), value=other, bound=0))
    return checks


def _compare_probe(probe: Probe, logits_BTV: Tensor, tolerance: float) -> list[Check]:
    """Compare logits at the ids of a probe: the same are written if each is the likeliest in its place."""
    ids_BT, expected_BV = torch.tensor(probe.ids), torch.tensor(probe.logits)
    written_BT = logits_BTV[:, probe.num_prompt - 1 : -1].argmax(-1)
    wrong = int((written_BT != ids_BT[:, probe.num_prompt :]).sum())
    found_BV = logits_BTV[:, -1, :NUM_LOGITS]
    if expected_BV.shape != found_BV.shape:
        raise NestlingError("its probe is of another shape; extract the member again")
    difference = float((found_BV - expected_BV).abs().nan_to_num(torch.inf).max()) / probe.largest
    return [
        Check(check="greedy ids", compared=ids_BT.numel(), value=wrong, bound=0),
        Check(check="logits", compared=found_BV.numel(), value=difference, bound=tolerance),
    ]


_Opened: TypeAlias = tuple[Callable[[Tensor], Tensor], Callable[[str], list[int]], int]
"""Logits of rows of ids, ids of a text, and the size of the vocabulary."""


def _open_folder(folder: Path) -> _Opened:
    stock: Any = load_stock(folder)
    tokenizer = load_stock_tokenizer(folder) if (folder / TOKENIZER).is_file() else None
    return (
        lambda ids_BT: stock(ids_BT, use_cache=False).logits,
        lambda text: list(tokenizer(text)["input_ids"]) if tokenizer else [],
        int(stock.config.vocab_size),
    )


def _open_file(path: Path) -> _Opened:
    opened = load_model(path, dtype=torch.float32, in_blocks=True, mapped=True)
    return (
        opened.model,
        lambda text: opened.tokenizer.encode(text).ids if opened.tokenizer else [],
        opened.model.config.vocab_size,
    )
