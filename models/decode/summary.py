"""Summaries of a continuation: the settings for JSON, and one line with its speed."""

import dataclasses
from typing import Any

from models.decode.decoder import Decoder
from models.decode.engine.drafters import DRAFTERS
from models.decode.engine.policy import NO_DRAFT
from models.decode.engine.report import Report
from models.packed.quantize import FILE, runs_on


def setting_fields(decoder: Decoder, *, seed: int, in_batch: bool) -> dict[str, Any]:
    """Return the settings that a text was written with, for JSON."""
    drafting = decoder.drafting
    return {
        **dataclasses.asdict(decoder.config.params),
        "verifier": drafting.verifier,
        "seed": seed,
        "dtype": decoder.dtype,
        "kernels": runs_on(decoder.folder.model),
        "draft": drafting.name,
        "gamma": _gamma(decoder, in_batch),
        "draft_dtype": drafting.precision or decoder.dtype,
        "draft_extra_bytes": drafting.extra_bytes,
    }


def describe_draft(decoder: Decoder, *, in_batch: bool) -> str:
    """Name the draft, how much it drafts, the model's dtype, and the kernels that run it."""
    drafting, gamma = decoder.drafting, _gamma(decoder, in_batch)
    note = f" ({drafting.note})" if drafting.note else ""
    others = f" or {', '.join(DRAFTERS)}" if drafting.copies and not in_batch else ""
    number = f", gamma {gamma}" if drafting.name != NO_DRAFT else ""
    kernels = runs_on(decoder.folder.model)
    return f"draft {drafting.name}{note}{others}{number} · {_weights(decoder)}, {kernels}"


def summarize(report: Report, draft: str) -> str:
    """Return one line with a text's length, speed, draft and end."""
    parts = [f"{report.num_tokens} tokens", f"{report.tokens_per_second or 0:.1f} tokens/s"]
    parts += [f"{report.speedup:.2f}x plain"] if report.speedup and report.drafted else []
    parts += [] if report.tau is None else [f"tau {report.tau:.2f}"]
    parts += [] if report.alpha is None else [f"alpha {report.alpha:.3f}"]
    return " · ".join([*parts, draft, report.finish_reason])


def _weights(decoder: Decoder) -> str:
    """Name the dtype, and the formats of a file whose own bits run."""
    kinds = decoder.folder.provenance.get("quantizations", ())
    return f"{', '.join(kinds)} as in the file" if decoder.dtype == FILE else decoder.dtype


def _gamma(decoder: Decoder, in_batch: bool) -> int | str:
    """Return the gamma to show. In a batch none adapts: a round takes as long as its companions'."""
    return "auto" if decoder.drafting.adapts and not in_batch else decoder.drafting.gamma
