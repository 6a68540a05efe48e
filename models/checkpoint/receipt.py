"""The receipt of an extraction: what was run when it was written, so that anyone can run it again anywhere.

    receipt.json   checks: what was compared, and how it came out
                   probe: prompts, their greedy continuations, and some logits of the member in place
                   files: SHA-256 of each; versions of what ran

The probe stands for the parent, which need not be there when the receipt is repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.base.files import hash_files, naming, read_json, write_json
from models.checkpoint.huggingface import load_stock, load_stock_tokenizer

RECEIPT = "receipt.json"
FORMAT = 1
NUM_LOGITS = 16
"""Logits of the last position that a probe keeps, of each text."""
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


def write_receipt(
    folder: Path,
    probe: Probe,
    checks: Sequence[Check],
    *,
    source: Mapping[str, Any],
    card: Mapping[str, Any],
) -> None:
    """Write the receipt of a folder whose other files are there.

    Args:
        folder: the extraction.
        probe: of the member in place.
        checks: what was compared.
        source: where it comes from.
        card: commit, versions, hardware, date.
    """
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != RECEIPT)
    fields = {
        "format": FORMAT,
        "source": dict(source),
        "checks": [asdict(check) | {"holds": check.holds} for check in checks],
        "probe": asdict(probe),
        "files": {name: hash_files(folder / name) for name in files},
        "card": dict(card),
    }
    write_json(folder / RECEIPT, fields)


def read_receipt(folder: Path) -> dict[str, Any]:
    """Return a receipt.

    Raises:
        NestlingError: if it is missing or damaged.
    """
    fields = read_json(folder / RECEIPT)
    with naming(folder / RECEIPT):
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
def repeat_receipt(folder: Path, tolerance: float) -> list[Check]:
    """Compare a folder with its receipt: files, greedy ids and logits in transformers, tokens of texts.

    Args:
        folder: the extraction.
        tolerance: how far logits may be off, relative to the largest.

    Raises:
        NestlingError: if the receipt is damaged, or the folder does not open.
    """
    fields = read_receipt(folder)
    probe = Probe(**fields["probe"])
    changed = [
        name
        for name, digest in fields["files"].items()
        if not (folder / name).is_file() or hash_files(folder / name) != digest
    ]
    checks = [Check(check="files", compared=len(fields["files"]), value=len(changed), bound=0)]
    stock: Any = load_stock(folder)
    if max(map(max, probe.ids)) >= stock.config.vocab_size:
        raise NestlingError(
            f"{folder / RECEIPT}: its probe is of another vocabulary; extract the member again"
        )
    ids_BT = torch.tensor(probe.ids)[:, : probe.num_prompt]
    expected_BT = torch.tensor(probe.ids)
    for _ in range(expected_BT.shape[1] - probe.num_prompt):
        next_B1 = stock(ids_BT, use_cache=False).logits[:, -1:].argmax(-1)
        ids_BT = torch.cat([ids_BT, next_B1], dim=1)
    wrong = int((ids_BT != expected_BT).sum())
    checks.append(Check(check="greedy ids", compared=expected_BT.numel(), value=wrong, bound=0))
    logits_BV = stock(expected_BT, use_cache=False).logits[:, -1, :NUM_LOGITS]
    expected_BV = torch.tensor(probe.logits)
    if expected_BV.shape != logits_BV.shape:
        raise NestlingError(f"{folder / RECEIPT}: its probe is of another shape; extract the member again")
    difference = float((logits_BV - expected_BV).abs().nan_to_num(torch.inf).max()) / probe.largest
    checks.append(Check(check="logits", compared=logits_BV.numel(), value=difference, bound=tolerance))
    if probe.text_ids:
        tokenizer = load_stock_tokenizer(folder)
        found = [tokenizer(text)["input_ids"] for text in TEXTS]
        other = sum(ours != theirs for ours, theirs in zip(found, probe.text_ids, strict=True))
        checks.append(Check(check="tokens of texts", compared=len(TEXTS), value=other, bound=0))
    return checks
