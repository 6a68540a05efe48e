"""`nestling generate`: continue a text, with a member of the family as the draft; see models/decode/."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from models.base.progress import progress_bar
from train.commands.common import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_file,
    check_gamma,
    check_json,
    write_results,
)
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.decode.decoder import Decoder
    from models.decode.engine.report import Report
    from models.decode.text import GenerationResult, TextStream
    from models.decode.tune.resolve import Drafting


def generate(
    model: ModelArgument,
    *,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Continue many instead: one JSON object a line with a prompt, turns or a text.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Of --prompts: texts that share their passes.")] = 8,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="G[@int4|int8|bf16]|auto|lookup|none|DIR",
            help="What drafts: a member, the best one here (and lookup), copies of earlier text, nothing, or "
            "another model folder. Default: auto; none when sampling, where each draft gives another text "
            "for a seed (not so with --verifier coupled).",
        ),
    ] = None,
    gamma: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Drafted tokens a round. auto follows what it measures, and is hardly slower than plain "
            "decoding whatever drafts. Default: auto; 4 when sampling with a draft that was named, since "
            "lengths that follow the clock give another text for a seed (not so with --verifier coupled).",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep what is this share as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that the text has already become less likely.")
    ] = 1.0,
    verifier: Annotated[
        str | None,
        typer.Option(
            metavar="token|block|coupled",
            help="How drafted tokens are judged when sampling; coupled writes the same text for a seed "
            "whatever drafts. Default: auto's choice, or block.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")
    ] = None,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Continue a text; speculative decoding follows the full model's distribution whatever drafts."""
    check_json(json)
    _check_texts(prompt, stop or [])
    _check_source(prompt, prompts, batch_size)
    number = check_gamma(gamma, least=0)
    from models.decode.decoder import open_decoder
    from models.decode.prompts import read_prompts
    from models.decode.sampling.params import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    decoder = open_decoder(model, draft=draft, gamma=number, params=params, verifier=verifier, dtype=dtype)
    drafting, dtype = decoder.drafting, decoder.dtype
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop or (), "seed": seed}
    alone = prompt is not None  # a batch neither adapts nor copies
    gamma_shown = "auto" if drafting.adapts and alone else drafting.gamma
    asked: dict[str, Any] = {
        **dataclasses.asdict(params),
        "verifier": drafting.verifier,
        "seed": seed,
        "dtype": dtype,
    }
    asked |= {"draft": drafting.name, "gamma": gamma_shown, "draft_dtype": drafting.precision or dtype}
    asked |= {"draft_extra_bytes": drafting.extra_bytes}
    who = f"{_who(drafting, gamma_shown, copies=drafting.copies and alone)} · {dtype}"
    errors = make_console(stderr=True)
    if prompt is not None:
        pieces = decoder.stream(prompt, **options)
        _show(pieces, make_console())
        result = pieces.result()
        errors.print(_summary(result.report, who), style="dim", soft_wrap=True)
        results: dict[str, Any] = {"prompt": prompt, **result.as_dict(), **asked}
    else:
        assert prompts is not None
        texts = read_prompts(prompts)
        started = perf_counter()
        rows = _continue_many(decoder, texts, batch_size, options, errors)
        num_tokens = sum(row.report.num_tokens for row in rows)
        rate = num_tokens / (perf_counter() - started)
        count = f"{len(rows)} texts, {num_tokens} tokens · {rate:.1f} tokens/s"
        errors.print(f"{count} · {who} · batches of {batch_size}", style="dim", soft_wrap=True)
        each = [{"prompt": text, **row.as_dict()} for text, row in zip(texts, rows, strict=True)]
        results = {"results": each, "batch_size": batch_size, "tokens_per_second": rate, **asked}
    write_results(json, results, dtypes={"model": dtype})


def _continue_many(
    decoder: "Decoder", prompts: Sequence[str], batch_size: int, options: dict[str, Any], errors: Console
) -> "list[GenerationResult]":
    """Continue each prompt, so many at a time, and show the texts of a batch when it is done."""
    results: list[GenerationResult] = []
    console = make_console()
    with progress_bar("decoding", len(prompts), console=errors) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            done = decoder.generate_batch(batch, **options)
            for prompt, result in zip(batch, done, strict=True):
                console.file.write(f"{prompt}{result.text}\n\n")
            results += done
            bar.advance(len(batch))
    return results


def _check_source(prompt: str | None, prompts: Path | None, batch_size: int) -> None:
    if (prompt is None) == (prompts is None):
        raise UsageError("--prompt TEXT or --prompts FILE: give one of them; see nestling generate --help")
    if prompts:
        check_file("--prompts", prompts)
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")


def _check_texts(prompt: str | None, stop: list[str]) -> None:
    for flag, text in [("--prompt", prompt or ""), *(("--stop", text) for text in stop)]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"{flag} {text!r} is not UTF-8 text; encode it so") from None


def _show(pieces: "TextStream", console: Console) -> None:
    """Write the text as it comes; on a terminal drafted tokens are dim."""
    for piece in pieces:
        if console.is_terminal:
            style = "dim" if piece.drafted and not console.no_color else None
            console.print(piece.text, end="", style=style, markup=False, emoji=False, soft_wrap=True)
        else:
            console.file.write(piece.text)
        console.file.flush()
    console.file.write("\n")
    console.file.flush()


def _who(drafting: "Drafting", gamma: int | str, *, copies: bool) -> str:
    note = f" ({drafting.note})" if drafting.note else ""
    number = f", gamma {gamma}" if gamma else ""
    from models.decode.engine.drafters import DRAFTERS

    others = f" or {', '.join(DRAFTERS)}" if copies else ""
    return f"draft {drafting.name}{note}{others}{number}"


def _summary(report: "Report", who: str) -> str:
    parts = [f"{report.num_tokens} tokens", f"{report.tokens_per_second or 0:.1f} tokens/s"]
    parts += [f"{report.speedup:.2f}x plain"] if report.speedup and report.drafted else []
    parts += [] if report.tau is None else [f"tau {report.tau:.2f}"]
    parts += [] if report.alpha is None else [f"alpha {report.alpha:.3f}"]
    return " · ".join([*parts, who, report.finish_reason])
