"""Cut a member out as a GGUF file, and prove it.

The file reads back bit for bit. It opens here as llama.cpp opens it, in fp32: what its numbers give is
compared with the member in place, and kept in a receipt beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.base.files import check_room, finite, naming, read_json, write_file
from models.base.outputs import check_link
from models.base.paths import is_stream
from models.checkpoint.extract import (
    Parity,
    compare_logits,
    continue_greedily,
    fixed_prompts,
    in_fp32,
    provenance,
)
from models.checkpoint.folder import ModelFolder, load_model
from models.checkpoint.gguf import (
    OURS,
    architecture_of,
    check_gguf,
    count_file_bytes,
    holds,
    is_ours,
    write_gguf,
)
from models.checkpoint.gguf_tokenizer import differs_on, missing_bytes, tokenizer_keys
from models.checkpoint.receipt import TEXTS, TOKENS, Check, Probe, make_probe, receipt_path, write_receipt
from models.checkpoint.weights import dtype_name, hash_weights
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity
from models.elastic.view import View
from models.machine.provenance import make_card
from train.commands.export import NUM_NEW_TOKENS, parity_checks
from train.commands.rounding import HeldOut, measure_rounding, own_text, tell_rounding

_STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A GGUF file that was written and read back.

    Args:
        dtype: dtype of its matrices.
        parameters: number of elements of its tensors.
        bytes: size of the file.
        tensors: number of tensors compared, bit for bit.
        pre: llama.cpp's name of the pattern that cuts words.
        architecture: llama.cpp's name of it: unequal layers are `deci` or `openelm`.
        missing_bytes: bytes that have no token; texts without them are cut equally.
        rounding: how far it is from the member in place, see `measure_rounding`.
        checks: what its receipt says.
    """

    dtype: str
    parameters: int
    bytes: int
    tensors: int
    pre: str
    architecture: str
    missing_bytes: list[int]
    rounding: dict[str, Any]
    checks: list[Check]


def count_gguf_bytes(folder: ModelFolder, granularity: Granularity, dtype: str | None = None) -> int:
    """Return the bytes of a member's tensors in a file; arguments as of `extract_gguf`.

    Raises:
        UsageError: if the granularity or the dtype does not fit.
    """
    member = View(folder.model, granularity)
    dtype = dtype or _STORED[dtype_name(folder.model)]
    if not holds(folder.model.config, dtype, member.plan):
        raise UsageError(
            f"--dtype {dtype} packs 32 numbers at a time, and a width of {granularity} is no multiple of 32; "
            "choose fp16 or another granularity"
        )
    return count_file_bytes(member, dtype)


def extract_gguf(
    folder: ModelFolder,
    granularity: Granularity,
    out: Path,
    console: Console,
    *,
    dtype: str | None = None,
    text: HeldOut | None = None,
) -> GgufFile:
    """Write the member and its tokenizer as one file of llama.cpp, prove it, and say what it holds.

    Args:
        folder: the family, with its tokenizer.
        granularity: the member.
        out: the file; it may replace one that was written here, and nothing else.
        console: shows the progress.
        dtype: dtype of the matrices, a key of `models.checkpoint.gguf.DTYPES`; None keeps the one on disk.
        text: on which the file is compared with the member in place; None takes what that one writes.

    Raises:
        UsageError: if the granularity or the dtype does not fit, or `out` cannot be replaced.
        NestlingError: if llama.cpp would cut text into other tokens, the disk refuses, or the file reads
            back otherwise.
    """
    check_file_replaceable(out)
    check_room(out, count_gguf_bytes(folder, granularity, dtype))
    member = View(folder.model, granularity)
    dtype = dtype or _STORED[dtype_name(folder.model)]
    metadata = _metadata(folder, granularity, out)
    with console.status("writing the file and comparing it"), write_file(out) as partial:
        write_gguf(member, partial, dtype=dtype, metadata=metadata)
        tensors = check_gguf(member, partial, dtype=dtype, metadata=metadata)
        exact = dtype in ("fp32", _STORED[dtype_name(folder.model)])
        proof = _prove(folder, granularity, partial, text, exact=exact)
        bytes_ = partial.stat().st_size
        if not is_stream(out):  # that of a file which this one replaces; without one, nothing false is said
            receipt_path(out).unlink(missing_ok=True)
    written = GgufFile(
        dtype=dtype,
        parameters=count_parameters(folder.model.config, granularity),
        bytes=bytes_,
        tensors=tensors,
        pre=metadata["tokenizer.ggml.pre"],
        architecture=architecture_of(member),
        missing_bytes=[] if folder.tokenizer is None else missing_bytes(folder.tokenizer),
        rounding=proof.rounding,
        checks=[Check(check="tensors", compared=tensors, value=0, bound=0), *proof.checks],
    )
    if not is_stream(out):
        _write_receipt(folder, granularity, out, written, proof.probe)
    _tell(written, folder, granularity, out, console)
    return written


def _metadata(folder: ModelFolder, granularity: Granularity, out: Path) -> dict[str, Any]:
    """Return the keys of the file, those of the shape apart."""
    config = folder.model.config
    if folder.tokenizer is None:
        raise NestlingError(f"{folder.path} has no tokenizer.json, which a GGUF file holds; add it")
    with naming(folder.path):
        tokenizer = tokenizer_keys(folder.tokenizer, config, chat_template=folder.chat_template)
    origin = provenance(folder, granularity, count_parameters(config, granularity))
    return {
        "general.name": out.stem,
        OURS: str(granularity),
        "nestling.provenance": json.dumps(finite(origin)),
        **tokenizer,
    }


@dataclass(frozen=True, kw_only=True)
class _Proof:
    checks: list[Check]
    probe: Probe
    rounding: dict[str, Any]


def _prove(
    folder: ModelFolder,
    granularity: Granularity,
    path: Path,
    text: HeldOut | None,
    *,
    exact: bool,
) -> _Proof:
    """Open a file that was written, and compare it with the member in place.

    Args:
        folder: the family.
        granularity: the member.
        path: the file.
        text: see `extract_gguf`.
        exact: whether the file holds the member's very numbers.

    Raises:
        NestlingError: if it should be equal and is not, which is a bug of ours.
    """
    view, opened = (
        in_fp32(folder.model, granularity),
        load_model(path, dtype=torch.float32, in_blocks=True, mapped=True),
    )
    theirs = View(opened.model, FULL)
    num_new_tokens = min(NUM_NEW_TOKENS, folder.model.config.max_position_embeddings // 2)
    prompts_BT = fixed_prompts(folder.model.config, num_new_tokens)
    num_prompt = prompts_BT.shape[1]
    ours_BT = continue_greedily(view, prompts_BT, num_new_tokens)
    checks = []
    if exact:
        checks += parity_checks(_parity(view, theirs, ours_BT, num_prompt))
    theirs_BT = continue_greedily(theirs, prompts_BT, num_new_tokens)
    probe = _probe(theirs, theirs_BT, num_prompt, opened)
    if folder.tokenizer is not None and probe.text_ids:
        ids = [folder.tokenizer.encode(one).ids for one in TEXTS]
        other = sum(one != found for one, found in zip(ids, probe.text_ids, strict=True))
        checks.append(Check(check=TOKENS, compared=len(TEXTS), value=other, bound=0))
    if any(not one.holds for one in checks):
        told = ", ".join(f"{one.check}: {one.value:g}" for one in checks if not one.holds)
        raise NestlingError(f"{path} would differ from the member in place ({told}); please report this")
    return _Proof(
        checks=checks,
        probe=probe,
        rounding=measure_rounding(folder, view, theirs, own_text(ours_BT, num_prompt), text),
    )


@torch.no_grad()
def _parity(view: View, theirs: View, ids_BT: Tensor, num_prompt: int) -> Parity:
    return compare_logits(ids_BT, view(ids_BT), theirs(ids_BT), num_prompt)


@torch.no_grad()
def _probe(view: View, ids_BT: Tensor, num_prompt: int, opened: ModelFolder) -> Probe:
    return make_probe(ids_BT, view(ids_BT), num_prompt, opened.tokenizer)


def _write_receipt(
    folder: ModelFolder, granularity: Granularity, out: Path, written: GgufFile, probe: Probe
) -> None:
    source = {
        "parent": str(folder.path),
        "granularity": str(granularity),
        "dtype": written.dtype,
        "parent_sha256": hash_weights(folder.path),
    }
    card = make_card(dtypes={"comparison": "fp32", "weights": written.dtype})
    write_receipt(out, probe, written.checks, source=source, card=card, rounding=written.rounding)


def _tell(
    written: GgufFile, folder: ModelFolder, granularity: Granularity, out: Path, console: Console
) -> None:
    config = folder.model.config
    console.print(
        f"{out}: {granularity}, {written.parameters:,} of {count_parameters(config):,} parameters in "
        f"{written.dtype}, {written.bytes:,} bytes",
        markup=False,
    )
    console.print(f"read back equal: {written.tensors} tensors, {config.vocab_size:,} tokens")
    tell_rounding(written.rounding, console)
    if not is_stream(out):
        console.print(
            f"what was compared stands in {receipt_path(out)}; nestling verify on the file repeats it"
        )
    if written.missing_bytes:
        told = ", ".join(f"0x{byte:02x}" for byte in written.missing_bytes)
        console.print(
            f"{len(written.missing_bytes)} of the 256 bytes have no token ({told}): texts without them are "
            "cut equally"
        )
    if folder.tokenizer is not None and (texts := differs_on(folder.tokenizer)) is not None:
        console.print(f"llama.cpp does not normalise: {texts} has other tokens there")


def check_file_replaceable(out: Path) -> None:
    """Raise UsageError unless `out` is free, or a GGUF file that was written here."""
    check_link("--out", out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file, such as {out / 'model.gguf'}")
    if out.exists() and not is_ours(out):
        raise UsageError(f"--out {out} exists and is not ours to replace; choose another place")
    ancestor = next(parent for parent in out.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise UsageError(f"--out {out} cannot be: {ancestor} is not a folder; choose another place")
    receipt = receipt_path(out)
    if receipt.exists() and "probe" not in read_json(receipt):
        raise UsageError(f"{receipt} exists and is not ours to replace; choose another --out")
