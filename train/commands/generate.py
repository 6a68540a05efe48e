"""`nestling generate`: continue a text, with a member of the family as the draft; see models/decode/."""

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
    SeedOption,
    check_file,
    check_gamma,
    check_json,
    write_results,
)
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.decode.decoder import Decoder
    from models.decode.text import GenerationResult, TextStream

SAMPLING, DRAFTING = "Sampling", "Speculative decoding"
PromptOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with many texts to continue: one JSON object a line, with a field prompt, turns or text.",
    ),
]
BatchSizeOption = Annotated[
    int, typer.Option(help="Number of texts of --prompts that are decoded at the same time.")
]
MaxNewTokensOption = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Text that ends the output and is not part of it; repeatable."),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="G[@int4|int8|bf16]|auto|lookup|none|DIR",
        rich_help_panel=DRAFTING,
        help="Draft model: a member of the family, the best one on this machine (auto), copies of earlier "
        "text (lookup), none, or another model folder. Default: auto; none when sampling, where each draft "
        "gives another text for a seed (not so with --verifier coupled).",
    ),
]
GammaOption = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        rich_help_panel=DRAFTING,
        help="Number of tokens to draft in each round. auto adapts it to what it measures, and is hardly "
        "slower than plain decoding whatever drafts. Default: auto; 4 when sampling with a named draft.",
    ),
]
VerifierOption = Annotated[
    str | None,
    typer.Option(
        metavar="token|block|coupled",
        rich_help_panel=DRAFTING,
        help="Rule that accepts or rejects drafted tokens when sampling; with coupled, a seed gives the same "
        "text whatever drafts. Default: the fastest one that a search found, or block.",
    ),
]
TemperatureOption = Annotated[
    float, typer.Option(rich_help_panel=SAMPLING, help="Sampling temperature; 0 decodes greedily.")
]
TopKOption = Annotated[
    int, typer.Option(rich_help_panel=SAMPLING, help="Keep only the k most likely tokens; 0 keeps all.")
]
TopPOption = Annotated[
    float,
    typer.Option(
        rich_help_panel=SAMPLING,
        help="Keep only the most likely tokens whose probabilities add up to this value.",
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        rich_help_panel=SAMPLING,
        help="Keep only tokens at least this fraction as likely as the most likely one.",
    ),
]
PenaltyOption = Annotated[
    float,
    typer.Option(
        rich_help_panel=SAMPLING,
        help="Penalty on tokens that the text has already; above 1 makes them less likely.",
    ),
]


def generate(
    model: ModelArgument,
    *,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    batch_size: BatchSizeOption = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    stop: StopOption = None,
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    json: JsonOption = None,
    draft: DraftOption = None,
    gamma: GammaOption = None,
    verifier: VerifierOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
) -> None:
    """Continue a text. Speculative decoding follows the full model's distribution whatever drafts."""
    check_json(json)
    _check_texts(prompt, stop or [])
    _check_source(prompt, prompts, batch_size)
    number = check_gamma(gamma, least=0)
    from models.decode.decoder import open_decoder
    from models.decode.sampling.params import SamplingParams
    from models.decode.summary import setting_fields

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    decoder = open_decoder(model, draft=draft, gamma=number, params=params, verifier=verifier, dtype=dtype)
    options = {"max_new_tokens": max_new_tokens, "stop": stop or (), "seed": seed}
    if prompt is not None:
        results = _continue_one(decoder, prompt, options)
    else:
        assert prompts is not None
        results = _continue_many(decoder, prompts, batch_size, options)
    results |= setting_fields(decoder, seed=seed, in_batch=prompt is None)
    write_results(json, results, dtypes={"model": decoder.dtype})


def _continue_one(decoder: "Decoder", prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    from models.decode.summary import describe_draft, summarize

    pieces = decoder.stream(prompt, **options)
    _show(pieces, make_console())
    result = pieces.result()
    line = summarize(result.report, describe_draft(decoder, in_batch=False))
    make_console(stderr=True).print(line, style="dim", markup=False, soft_wrap=True)
    return {"prompt": prompt, **result.as_dict()}


def _continue_many(
    decoder: "Decoder", path: Path, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    from models.decode.prompts import read_prompts
    from models.decode.summary import describe_draft

    prompts, errors = read_prompts(path), make_console(stderr=True)
    started = perf_counter()
    results = _decode_batches(decoder, prompts, batch_size, options, errors)
    num_tokens = sum(result.report.num_tokens for result in results)
    rate = num_tokens / (perf_counter() - started)
    line = f"{len(results)} texts, {num_tokens} tokens · {rate:.1f} tokens/s"
    line += f" · {describe_draft(decoder, in_batch=True)} · batches of {batch_size}"
    errors.print(line, style="dim", markup=False, soft_wrap=True)
    each = [{"prompt": text, **one.as_dict()} for text, one in zip(prompts, results, strict=True)]
    return {"results": each, "batch_size": batch_size, "tokens_per_second": rate}


def _decode_batches(
    decoder: "Decoder", prompts: Sequence[str], batch_size: int, options: dict[str, Any], errors: Console
) -> "list[GenerationResult]":
    """Continue the prompts in batches, and show the texts of a batch when it is done."""
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
