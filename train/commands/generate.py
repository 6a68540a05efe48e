"""`nestling generate`: continue a text, with a member of the family as the draft; see models/decode/."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from models.base.files import is_stream
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

WRITE_SECONDS = 5.0
"""The least time between two writes of unfinished results."""

if TYPE_CHECKING:
    from models.decode.decoder import Decoder
    from models.decode.prompts import Prompt
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
    from models.decode.prompts import read_prompts
    from models.decode.sampling.params import SamplingParams
    from models.decode.summary import setting_fields

    lines = read_prompts(prompts) if prompts else []
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    decoder = open_decoder(model, draft=draft, gamma=number, params=params, verifier=verifier, dtype=dtype)
    options = {"max_new_tokens": max_new_tokens, "stop": stop or (), "seed": seed}
    asked = setting_fields(decoder, seed=seed, in_batch=prompt is None)
    if prompt is not None:
        results = _continue_one(decoder, prompt, options)
        write_results(json, results | asked, dtypes={"model": decoder.dtype})
    else:
        texts = [line.text for line in lines]
        _check_lines(decoder, lines)
        answers = Answers(texts, {"batch_size": batch_size, **asked}, json, decoder.dtype)
        _continue_many(decoder, answers, batch_size, options)


def _continue_one(decoder: "Decoder", prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    from models.decode.summary import describe_draft, summarize

    pieces = decoder.stream(prompt, **options)
    _show(pieces, make_console())
    result = pieces.result()
    line = summarize(result.report, describe_draft(decoder, in_batch=False))
    make_console(stderr=True).print(line, style="dim", markup=False, soft_wrap=True)
    return {"prompt": prompt, **result.as_dict()}


class Answers:
    """The texts that `--prompts` gave so far; `--json` has them while the rest is decoded, and if that fails.

    Args:
        prompts: all of them.
        asked: what else the results tell.
        path: of the results; None writes none.
        dtype: that the model runs in.
    """

    def __init__(self, prompts: Sequence[str], asked: dict[str, Any], path: Path | None, dtype: str) -> None:
        self.prompts, self.asked, self.path, self.dtype = prompts, asked, path, dtype
        self.done: list[GenerationResult] = []
        self._started = self._written = perf_counter()

    def summary(self) -> str:
        """Return how many there are, and how fast they came."""
        return f"{len(self.done)} texts, {self._num_tokens} tokens · {self._rate:.1f} tokens/s"

    def write_now_and_then(self) -> None:
        """Write what there is, unless that was done a moment ago or what is written cannot be replaced."""
        if self.path and not is_stream(self.path) and perf_counter() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what there is."""
        each = [
            {"prompt": prompt, **one.as_dict()} for prompt, one in zip(self.prompts, self.done, strict=False)
        ]
        counts = {"num_prompts": len(self.prompts), "tokens_per_second": self._rate}
        write_results(self.path, {"results": each, **counts, **self.asked}, dtypes={"model": self.dtype})
        self._written = perf_counter()

    @property
    def _num_tokens(self) -> int:
        return sum(one.report.num_tokens for one in self.done)

    @property
    def _rate(self) -> float:
        return self._num_tokens / max(perf_counter() - self._started, 1e-9)


def _continue_many(decoder: "Decoder", answers: Answers, batch_size: int, options: dict[str, Any]) -> None:
    """Continue the prompts in batches, show the texts of a batch when it is done, and say how it went."""
    from models.decode.summary import describe_draft

    errors = make_console(stderr=True)
    try:
        _decode_batches(decoder, answers, batch_size, options, errors)
    finally:
        if answers.done:
            answers.write()
    line = f"{answers.summary()} · {describe_draft(decoder, in_batch=True)} · batches of {batch_size}"
    errors.print(line, style="dim", markup=False, soft_wrap=True)


def _decode_batches(
    decoder: "Decoder", answers: Answers, batch_size: int, options: dict[str, Any], errors: Console
) -> None:
    console, prompts = make_console(), answers.prompts
    with progress_bar("decoding", len(prompts), console=errors) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            done = decoder.generate_batch(batch, **options)
            for prompt, result in zip(batch, done, strict=True):
                console.file.write(f"{prompt}{result.text}\n\n")
            console.file.flush()
            answers.done += done
            answers.write_now_and_then()
            bar.advance(len(batch))


def _check_lines(decoder: "Decoder", lines: "Sequence[Prompt]") -> None:
    from models.decode.prompts import check_prompts

    config = decoder.folder.model.config
    has_start = config.bos_token_id is not None or config.first_eos_token_id is not None
    context = config.max_position_embeddings
    check_prompts(lines, decoder.tokenizer, context=context, has_start=has_start)


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
