"""Cut a member out as a folder, and prove it: in transformers it is equal to the member in place."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.base.errors import NestlingError
from models.base.files import read_json, write_json, write_text
from models.base.numbers import size
from models.checkpoint.extract import (
    LOGITS_TOLERANCE,
    Parity,
    compare_with_stock,
    continue_greedily,
    extract,
    fixed_prompts,
    in_fp32,
)
from models.checkpoint.folder import GENERATION, ModelFolder, load_model
from models.checkpoint.huggingface import load_stock_tokenizer
from models.checkpoint.layout import PADDED, RAGGED, Layout
from models.checkpoint.receipt import RECEIPT, TEXTS, TOKENS, Check, write_receipt
from models.checkpoint.weights import hash_weights
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity
from models.elastic.view import View
from models.machine.provenance import make_card
from train.commands.rounding import HeldOut, measure_rounding, own_text, tell_rounding
from train.report.card import CARD, PICTURE, Subject, model_card, picture

NUM_NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """A folder that was written and compared.

    Args:
        form: one of `models.checkpoint.layout.FORMS`.
        parameters: numbers in it, zeros of padding included.
        wasted_bytes: bytes of those zeros.
        parity: its comparison with the member in place; of a rounded one with what it opens as here.
        checks: what its receipt says.
        dtype: int8 or int4, if matrices are packed.
        rounding: how far a rounded one is from the member in place, see `measure_rounding`.
    """

    form: str
    parameters: int
    wasted_bytes: int
    parity: Parity
    checks: list[Check]
    dtype: str | None = None
    rounding: dict[str, Any] | None = None


def extract_and_prove(
    folder: ModelFolder,
    granularity: Granularity,
    out: Path,
    console: Console,
    *,
    form: str | None = None,
    dtype: str | None = None,
    text: HeldOut | None = None,
    search: Mapping[str, Any] | None = None,
) -> Extraction:
    """Write the member to `out`, open it in transformers, compare, say how it went; see `prove_member`."""
    with console.status("writing it, and comparing it with transformers"):
        written = prove_member(folder, granularity, out, form=form, dtype=dtype, text=text, search=search)
    _tell(written, folder, granularity, out, console)
    return written


def prove_member(
    folder: ModelFolder,
    granularity: Granularity,
    out: Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    text: HeldOut | None = None,
    search: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> Extraction:
    """Write the member to `out` with its card and receipt, open it in transformers and compare.

    Args:
        folder: the family.
        granularity: the member.
        out: the new folder.
        form: one of `models.checkpoint.layout.FORMS`, or None.
        dtype: int8 or int4 for matrices in few bits, or None.
        text: on which a rounded one is compared with the member in place; None takes what that one writes.
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
        rounding = None
        if dtype is None:
            parity, probe = compare_with_stock(folder, granularity, partial, num_new_tokens=num_new_tokens)
        else:
            opened = load_model(partial, dtype=torch.float32, mapped=True)
            parity, probe = compare_with_stock(opened, FULL, partial, num_new_tokens=num_new_tokens)
            rounding = _rounding(folder, granularity, opened, text, num_new_tokens)
        checks = parity_checks(parity)
        if probe.text_ids:
            tokenizer = load_stock_tokenizer(partial)
            found = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
            other = sum(ours != theirs for ours, theirs in zip(found, probe.text_ids, strict=True))
            checks.append(Check(check=TOKENS, compared=len(TEXTS), value=other, bound=0))
            probe = dataclasses.replace(probe, text_ids=found)  # it is run again in transformers
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
            dtype=dtype,
            rounding=rounding,
        )
        _write_card(folder, granularity, partial, out, layout, written, search)
        source = {"parent": str(folder.path), "granularity": str(granularity), "form": layout.form}
        source["parent_sha256"] = hash_weights(folder.path)
        card = make_card(dtypes={"comparison": "fp32", **({"weights": dtype} if dtype else {})})
        write_receipt(partial, probe, checks, source=source, card=card, rounding=rounding)
        proved.append(written)

    extract(folder, granularity, out, form=form, dtype=dtype, finish=prove)
    return proved[0]


def _rounding(
    folder: ModelFolder,
    granularity: Granularity,
    opened: ModelFolder,
    text: HeldOut | None,
    num_new_tokens: int,
) -> dict[str, Any]:
    """Return how far an extraction that was opened is from the member in place."""
    view, prompts_BT = in_fp32(folder.model, granularity), fixed_prompts(folder.model.config, num_new_tokens)
    own = own_text(continue_greedily(view, prompts_BT, num_new_tokens), prompts_BT.shape[1])
    return measure_rounding(folder, view, View(opened.model, FULL), own, text)


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
    written: Extraction,
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
        dtype=written.dtype,
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
    packed = f" in {written.dtype}" if written.dtype else ""
    console.print(f"{out}: {granularity}, {parameters:,} of {full:,} parameters{packed}", markup=False)
    opens = "transformers, with trust_remote_code=True" if written.form == RAGGED else "stock transformers"
    console.print(
        f"equal in {opens}: {parity.num_tokens} greedy tokens identical, "
        f"logits differ by {parity.difference:.1g} of the largest"
    )
    if written.rounding is not None:
        tell_rounding(written.rounding, console)
    if any(one.check == TOKENS and not one.holds for one in written.checks):
        console.print(
            "transformers cuts texts into other tokens than tokenizer.json does, as the model's "
            "tokenizer_config.json asks it to"
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
