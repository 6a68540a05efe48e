"""`nestling generate`: continue a text, with a member of the family as the draft; see models/decode/."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from train.commands.common import (
    check_at_least,
    check_file,
    check_gamma,
    check_json,
    draft_paths,
    write_results,
)
from train.commands.console import make_console
from train.commands.options import (
    DRAFTING,
    SAMPLING,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelArgument,
    PromptsOption,
    SeedOption,
    draft_option,
    gamma_option,
    temperature_option,
    token_file_option,
)

if TYPE_CHECKING:
    from models.decode.decoder import Decoder
    from models.decode.text import GenerationResult, TextOrIds, TextStream
    from train.commands.generate_many import Encode

ELSEWHERE = "Verifying or running the layers elsewhere"
PromptOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.")]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Apply the model's chat template: --prompt asks one question, --prompts one a line; without "
        "either, talk at the terminal.",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message that begins each conversation of --chat.")
]
BatchSizeOption = Annotated[
    int, typer.Option(help="Number of texts of --prompts that are decoded at the same time.")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Text that ends the output and is not part of it; repeatable."),
]
DraftOption = Annotated[
    str | None,
    draft_option(
        "auto; none when sampling, where each draft gives another text for a seed (not so with --verifier "
        "coupled)",
        lookup=True,
    ),
]
GammaOption = Annotated[str | None, gamma_option("auto; 4 when sampling with a named draft")]
TemperatureOption = Annotated[float, temperature_option()]
VerifierOption = Annotated[
    str | None,
    typer.Option(
        metavar="token|block|coupled",
        rich_help_panel=DRAFTING,
        help="Rule that accepts or rejects drafted tokens when sampling; with coupled, a seed gives the same "
        "text whatever drafts. Default: the fastest one that a search found, or block.",
    ),
]
RemoteOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        rich_help_panel=ELSEWHERE,
        help="Server that verifies what MODEL drafts, as nestling serve --verify starts it: "
        "ws://127.0.0.1:PORT or wss://HOST:PORT. The text is the server's, as with --verifier coupled there.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=ELSEWHERE,
        help="Number of drafted blocks on their way at the same time; 1 waits for each. Default: 2.",
    ),
]
TokenOption = Annotated[Path | None, token_file_option(ELSEWHERE)]
CaOption = Annotated[
    Path | None,
    typer.Option(metavar="PEM", rich_help_panel=ELSEWHERE, help="Certificate to trust besides the system's."),
]
StagesOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT,...",
        rich_help_panel=ELSEWHERE,
        help="Stages that run the layers, in their order, as nestling stage starts them. MODEL, a member, "
        "embeds, gives logits and drafts. The text is that of one machine, as with --verifier coupled there.",
    ),
]
SparesOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT,...",
        rich_help_panel=ELSEWHERE,
        help="Stages that stand in for one of --stages with their layers that is lost.",
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=ELSEWHERE,
        help="Time without an answer after which the text ends. Default: 30.",
    ),
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
    chat: ChatOption = False,
    system: SystemOption = None,
    batch_size: BatchSizeOption = 8,
    max_new_tokens: MaxNewTokensOption = 128,
    stop: StopOption = None,
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    json: JsonOption = None,
    draft: DraftOption = None,
    gamma: GammaOption = None,
    verifier: VerifierOption = None,
    remote: RemoteOption = None,
    window: WindowOption = None,
    token_file: TokenOption = None,
    stages: StagesOption = None,
    spares: SparesOption = None,
    ca: CaOption = None,
    timeout: TimeoutOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
) -> None:
    """Continue a text, or answer a question. Speculative decoding keeps the full model's distribution."""
    check_json(json, MODEL=model, prompts=prompts, draft=draft_paths([draft] if draft else None))
    _check_texts(prompt, stop or [])
    _check_source(prompt, prompts, batch_size, chat)
    if system is not None and not chat:
        raise UsageError(f"--system {system!r} begins a conversation; add --chat, or leave it out")
    number = check_gamma(gamma, least=0)
    from train.commands.elsewhere import Elsewhere, check_elsewhere, open_stages

    away = Elsewhere(remote, window, stages, spares, token_file, ca, timeout)
    check_elsewhere(away, prompt, number, draft=draft, verifier=verifier, prompts=prompts)
    if remote is not None:
        draft, verifier = "none", "coupled"
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
    if stages is not None:
        decoder = open_stages(away, model, gamma=number, params=params, verifier=verifier, dtype=dtype)
    else:
        decoder = open_decoder(
            model, draft=draft, gamma=number, params=params, verifier=verifier, dtype=dtype
        )
    options = {"max_new_tokens": max_new_tokens, "stop": stop or (), "seed": seed}
    settings = setting_fields(decoder, seed=seed, in_batch=prompts is not None)
    encode = _encoder(decoder, chat, system)
    if remote is not None and prompt is not None:
        from train.commands.generate_remote import continue_remotely

        results = continue_remotely(decoder, away, number, prompt, encode, options, show=_show)
        write_results(json, settings | results, dtypes={"model": decoder.dtype})
        return
    if prompts is not None:
        from train.commands.converse import first_messages
        from train.commands.generate_many import Answers, check_lines, continue_many

        check_lines(decoder, lines, encode)
        texts = [line.text for line in lines]
        messages = functools.partial(first_messages, system) if chat else None
        answers = Answers(texts, {"batch_size": batch_size, **settings}, json, decoder.dtype, messages)
        continue_many(decoder, answers, encode, batch_size, options)
        return
    if prompt is not None:
        results = _continue_one(decoder, prompt, encode(prompt), options)
    else:
        results = _converse(decoder, system, options)
    write_results(json, results | settings, dtypes={"model": decoder.dtype})


def _encoder(decoder: "Decoder", chat: bool, system: str | None) -> "Encode":
    if not chat:
        return lambda text: text
    from train.commands.converse import first_messages

    return lambda text: decoder.encode_chat(first_messages(system, text))


def _converse(decoder: "Decoder", system: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from train.commands.converse import converse

    results = []
    for question, result in converse(decoder, system, options, show=_show, console=make_console()):
        _summarize(decoder, result)
        results.append({"prompt": question, **result.as_dict()})
    return {"results": results}


def _summarize(decoder: "Decoder", result: "GenerationResult") -> None:
    from models.decode.summary import describe_draft, summarize

    line = summarize(result.report, describe_draft(decoder, in_batch=False))
    make_console(stderr=True).print(line, style="dim", markup=False, soft_wrap=True)


def _continue_one(
    decoder: "Decoder", prompt: str, encoded: "TextOrIds", options: dict[str, Any]
) -> dict[str, Any]:
    pieces = decoder.stream(encoded, **options)
    _show(pieces, make_console())
    result = pieces.result()
    _summarize(decoder, result)
    return {"prompt": prompt, **result.as_dict()}


def _check_source(prompt: str | None, prompts: Path | None, batch_size: int, chat: bool) -> None:
    num_sources = (prompt is not None) + (prompts is not None)
    if num_sources > 1 or (num_sources == 0 and not chat):
        raise UsageError("--prompt TEXT or --prompts FILE: give one of them; see nestling generate --help")
    if prompts:
        check_file("--prompts", prompts)
    check_at_least(1, batch_size=batch_size)


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
