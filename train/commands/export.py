"""Cut a member out and prove it.

A stock folder is equal in transformers to the member in place, a GGUF file is equal when it is read back.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from models.base.errors import NestlingError, UsageError
from models.base.files import check_room, finite, naming, read_json, write_file, write_json, write_text
from models.base.numbers import size
from models.base.outputs import check_link
from models.checkpoint.extract import (
    LOGITS_TOLERANCE,
    Parity,
    compare_with_stock,
    extract,
    provenance,
)
from models.checkpoint.folder import GENERATION, ModelFolder
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
from models.checkpoint.huggingface import load_stock_tokenizer
from models.checkpoint.layout import PADDED, RAGGED, Layout
from models.checkpoint.receipt import RECEIPT, TEXTS, Check, write_receipt
from models.checkpoint.weights import dtype_name, hash_weights
from models.elastic.count import count_parameters
from models.elastic.granularity import Granularity
from models.elastic.view import View
from models.machine.provenance import make_card
from train.report.card import CARD, PICTURE, Subject, model_card, picture

NUM_NEW_TOKENS = 32
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
    """

    dtype: str
    parameters: int
    bytes: int
    tensors: int
    pre: str
    architecture: str
    missing_bytes: list[int]


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A folder that was written and compared.

    Args:
        form: one of `models.checkpoint.layout.FORMS`.
        parameters: numbers in it, zeros of padding included.
        wasted_bytes: bytes of those zeros.
        parity: its comparison with the member in place.
        checks: what its receipt says.
    """

    form: str
    parameters: int
    wasted_bytes: int
    parity: Parity
    checks: list[Check]


def extract_and_prove(
    folder: ModelFolder,
    granularity: Granularity,
    out: Path,
    console: Console,
    *,
    form: str | None = None,
    search: Mapping[str, Any] | None = None,
) -> Extraction:
    """Write the member to `out`, open it in transformers, compare, say how it went; see `prove_member`."""
    with console.status("writing it, and comparing it with transformers"):
        written = prove_member(folder, granularity, out, form=form, search=search)
    _tell(written, folder, granularity, out, console)
    return written


def prove_member(
    folder: ModelFolder,
    granularity: Granularity,
    out: Path,
    *,
    form: str | None = None,
    search: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Extraction:
    """Write the member to `out` with its card and receipt, open it in transformers and compare.

    Args:
        folder: the family.
        granularity: the member.
        out: the new folder.
        form: one of `models.checkpoint.layout.FORMS`, or None.
        search: what a search found that chose the member, as `--json` writes it.
        generation: further settings of generation_config.json.

    Raises:
        UsageError: if the granularity or the form does not fit, or `out` cannot be replaced.
        NestlingError: if the disk refuses, or the two differ, which is a bug of ours; then nothing is left.
    """
    num_new_tokens = min(NUM_NEW_TOKENS, folder.model.config.max_position_embeddings // 2)
    proved: list[Extraction] = []

    def prove(partial: Path, layout: Layout) -> None:
        if generation:
            path = partial / GENERATION
            write_json(path, {**(read_json(path) if path.is_file() else {}), **generation})
        parity, probe = compare_with_stock(folder, granularity, partial, num_new_tokens=num_new_tokens)
        checks = parity_checks(parity)
        if probe.text_ids:
            tokenizer = load_stock_tokenizer(partial)
            found = [tokenizer(text)["input_ids"] for text in TEXTS]
            other = sum(ours != theirs for ours, theirs in zip(found, probe.text_ids, strict=True))
            checks.append(Check(check="tokens of texts", compared=len(TEXTS), value=other, bound=0))
        if not parity.holds:
            raise NestlingError(
                f"{out} would differ from the member in place (greedy ids equal: {parity.ids_equal}, logits "
                f"differ by {parity.difference:.1e} of the largest); please report this"
            )
        written = Extraction(
            form=layout.form,
            parameters=layout.parameters,
            wasted_bytes=layout.wasted * folder.model.dtype.itemsize,
            parity=parity,
            checks=checks,
        )
        _write_card(folder, granularity, partial, out, layout, search)
        source = {"parent": str(folder.path), "granularity": str(granularity), "form": layout.form}
        source["parent_sha256"] = hash_weights(folder.path)
        write_receipt(partial, probe, checks, source=source, card=make_card(dtypes={"comparison": "fp32"}))
        proved.append(written)

    extract(folder, granularity, out, form=form, finish=prove)
    return proved[0]


def parity_checks(parity: Parity) -> list[Check]:
    """Return a comparison with transformers as checks of a receipt."""
    return [
        Check(check="greedy ids", compared=parity.num_tokens, value=not parity.ids_equal, bound=0),
        Check(check="logits", compared=parity.num_tokens, value=parity.difference, bound=LOGITS_TOLERANCE),
    ]


def _write_card(
    folder: ModelFolder,
    granularity: Granularity,
    partial: Path,
    out: Path,
    layout: Layout,
    search: Mapping[str, Any] | None,
) -> None:
    text = str(granularity)
    known = next((one for one in folder.members if one.granularity == text), None)
    found = search["members"] if search else []
    measured = next((one["loss"] for one in found if one["granularity"] == text), None)
    subject = Subject(
        title=out.name,
        granularity=text,
        form=layout.form,
        parameters=layout.parameters,
        full_parameters=count_parameters(folder.model.config),
        loss=known.loss if known and measured is None else measured,
        alpha=known.alpha if known else None,
        members=folder.members,
        others=[(one["costs"]["params"], one["loss"]) for one in found if "params" in one["costs"]],
        budget=", ".join(search["budgets"]) if search else None,
        provenance=folder.provenance,
    )
    write_text(partial / CARD, model_card(subject))
    if (drawn := picture(subject)) is not None:
        write_text(partial / PICTURE, drawn)


def _tell(
    written: Extraction, folder: ModelFolder, granularity: Granularity, out: Path, console: Console
) -> None:
    config, parity = folder.model.config, written.parity
    parameters, full = count_parameters(config, granularity), count_parameters(config)
    console.print(f"{out}: {granularity}, {parameters:,} of {full:,} parameters", markup=False)
    opens = "transformers, with trust_remote_code=True" if written.form == RAGGED else "stock transformers"
    console.print(
        f"equal in {opens}: {parity.num_tokens} greedy tokens identical, "
        f"logits differ by {parity.difference:.1g} of the largest"
    )
    if written.checks:
        console.print(f"what was compared stands in its {RECEIPT}; nestling verify on it compares again")
    if written.form == RAGGED:
        console.print(
            "its layers are unequal: modeling_nestling.py builds each from config.json's per_layer_config; "
            "without trust_remote_code transformers names the field. --form padded needs no code"
        )
    elif written.form == PADDED:
        share = 1 - parameters / written.parameters
        console.print(
            f"its layers are unequal, filled up with zeros: {size(written.wasted_bytes)} wasted, {share:.0%}"
        )


def extract_gguf(
    folder: ModelFolder, granularity: Granularity, out: Path, console: Console, *, dtype: str | None = None
) -> GgufFile:
    """Write the member and its tokenizer as one file of llama.cpp, read it back, and say what it holds.

    Args:
        folder: the family, with its tokenizer.
        granularity: the member.
        out: the file; it may replace one that was written here, and nothing else.
        console: shows the progress.
        dtype: dtype of the matrices, a key of `models.checkpoint.gguf.DTYPES`; None keeps the one on disk.

    Raises:
        UsageError: if the granularity or the dtype does not fit, or `out` cannot be replaced.
        NestlingError: if llama.cpp would cut text into other tokens, the disk refuses, or the file reads
            back otherwise.
    """
    check_file_replaceable(out)
    member = View(folder.model, granularity)
    config = folder.model.config
    dtype = dtype or _STORED[dtype_name(folder.model)]
    if not holds(config, dtype, member.plan):
        raise UsageError(
            f"--dtype {dtype} packs 32 numbers at a time, and a width of {granularity} is no multiple of 32; "
            "choose fp16 or another granularity"
        )
    check_room(out, count_file_bytes(member, dtype))
    if folder.tokenizer is None:
        raise NestlingError(f"{folder.path} has no tokenizer.json, which a GGUF file holds; add it")
    with naming(folder.path):
        tokenizer = tokenizer_keys(folder.tokenizer, config, chat_template=folder.chat_template)
    parameters = count_parameters(config, granularity)
    missing = missing_bytes(folder.tokenizer)
    metadata = {
        "general.name": out.stem,
        OURS: str(granularity),
        "nestling.provenance": json.dumps(finite(provenance(folder, granularity, parameters))),
        **tokenizer,
    }
    with console.status("writing the file and reading it back"), write_file(out) as partial:
        write_gguf(member, partial, dtype=dtype, metadata=metadata)
        tensors = check_gguf(member, partial, dtype=dtype, metadata=metadata)
    written = GgufFile(
        dtype=dtype,
        parameters=parameters,
        bytes=out.stat().st_size,
        tensors=tensors,
        pre=tokenizer["tokenizer.ggml.pre"],
        architecture=architecture_of(member),
        missing_bytes=missing,
    )
    full = count_parameters(config)
    console.print(
        f"{out}: {granularity}, {parameters:,} of {full:,} parameters in {dtype}, {written.bytes:,} bytes",
        markup=False,
    )
    console.print(f"read back equal: {tensors} tensors, {config.vocab_size:,} tokens")
    if missing:
        told = ", ".join(f"0x{byte:02x}" for byte in missing)
        console.print(
            f"{len(missing)} of the 256 bytes have no token ({told}): texts without them are cut equally"
        )
    if (texts := differs_on(folder.tokenizer)) is not None:
        console.print(f"llama.cpp does not normalise: {texts} has other tokens there")
    return written


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
