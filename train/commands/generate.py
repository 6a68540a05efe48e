"""`nestling generate`: continue a text, with a member of the family as the draft; see models/decode/."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from models.errors import NestlingError, UsageError
from train.commands.common import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_json,
    open_for_decoding,
    write_results,
)
from train.console import make_console

if TYPE_CHECKING:
    from models.decode.report import Report
    from models.decode.text import TextStream
    from train.commands.drafting import Drafting


def generate(
    model: ModelArgument,
    *,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.")],
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="G[@int8|bf16]|auto|lookup|none|DIR",
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
    """Continue a text; speculative decoding follows the full model's law whatever drafts."""
    check_json(json)
    _check_texts(prompt, stop or [])
    number = _check_gamma(gamma)
    from models.decode.choose import COUPLED, check_verifier
    from models.decode.sampling import SamplingParams
    from models.decode.text import stream_text
    from train.commands.drafting import AUTO, choose_drafting, make_policy

    if verifier is not None:
        check_verifier(verifier)
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    folder, dtype = open_for_decoding(model, dtype)
    if folder.tokenizer is None:
        raise NestlingError(f"{model} has no tokenizer.json; put the one it was trained with there")
    repeats = params.is_greedy or verifier == COUPLED  # the text does not depend on who drafts
    draft = draft or (AUTO if repeats else "none")
    copies = draft == AUTO and number is None
    adapts = number is None and draft != "none" and (AUTO in (gamma, draft) or repeats)
    drafting = choose_drafting(folder, draft, number, params, dtype=dtype, verifier=verifier)
    pieces = stream_text(
        folder.model,
        folder.tokenizer,
        prompt,
        policy=make_policy(folder, drafting, params, adapts=adapts, copies=copies),
        params=params,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        seed=seed,
        verifier=drafting.verifier,
    )
    _show(pieces, make_console())
    result = pieces.result()
    shown = AUTO if adapts else drafting.gamma
    who = _who(drafting, shown, copies=copies)
    make_console(stderr=True).print(_summary(result.report, who, dtype), style="dim", soft_wrap=True)
    asked = {"prompt": prompt, **dataclasses.asdict(params), "verifier": drafting.verifier}
    asked |= {"seed": seed, "draft": drafting.name, "gamma": shown, "dtype": dtype}
    asked |= {"draft_dtype": drafting.precision or dtype, "draft_extra_bytes": drafting.extra_bytes}
    write_results(json, {**result.as_dict(), **asked}, dtypes={"model": dtype})


def _check_gamma(text: str | None) -> int | None:
    """The number of `--gamma`, None without one."""
    if text is None or text == "auto":
        return None
    try:
        number = int(text)
    except ValueError:
        raise UsageError(f"--gamma {text!r} is no number; give 0 or more, or auto") from None
    if number < 0:
        raise UsageError(f"--gamma must be 0 or more, or auto, got {number}")
    return number


def _check_texts(prompt: str, stop: list[str]) -> None:
    for flag, text in [("--prompt", prompt), *(("--stop", text) for text in stop)]:
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
    return f"draft {drafting.name}{note}{' or lookup' if copies else ''}{number}"


def _summary(report: "Report", who: str, dtype: str) -> str:
    parts = [f"{report.num_tokens} tokens", f"{report.tokens_per_second or 0:.1f} tokens/s"]
    parts += [f"{report.speedup:.2f}x plain"] if report.speedup and report.drafted else []
    parts += [] if report.tau is None else [f"tau {report.tau:.2f}"]
    parts += [] if report.alpha is None else [f"alpha {report.alpha:.3f}"]
    return " · ".join([*parts, who, dtype, report.finish_reason])
