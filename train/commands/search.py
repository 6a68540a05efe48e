"""`nestling search`: the draft that decodes fastest on this machine; see train/search/drafts.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import NestlingError, UsageError
from models.base.progress import progress_bar
from train.commands.common import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_file,
    check_json,
    write_results,
)
from train.commands.console import make_console
from train.commands.evaluate import take_batches

if TYPE_CHECKING:
    from rich.console import Console

    from models.checkpoint.folder import ModelFolder
    from models.decode.sampling.params import SamplingParams
    from models.decode.tune.draft_plan import DraftPlan, DraftSpec
    from models.decode.tune.tuned import Plans
    from train.search.confirm import Confirmed
    from train.search.drafts import Result
    from train.search.measure import Prediction, Progress, Text

NUM_PROMPT, NUM_NEW = 32, 96
"""Tokens of a row of text: the prompt, and what the target writes."""


def search(
    model: ModelArgument,
    *,
    draft: Annotated[
        bool, typer.Option("--draft", help="Search for the draft; --draft auto takes what was found.")
    ] = False,
    data: Annotated[
        str, typer.Option(metavar="FILE", help="Text to measure on: .txt, .jsonl or .parquet, or stdlib.")
    ],
    num_tokens: Annotated[int, typer.Option(help="Measure acceptance on so many tokens.")] = 4096,
    temperature: Annotated[
        list[float] | None,
        typer.Option(help="0 takes the likeliest token; repeatable. Default: 0 and 1."),
    ] = None,
    granularity: Annotated[
        list[str] | None, typer.Option(metavar="G", help="Also consider this one; repeatable.")
    ] = None,
    confirm: Annotated[int, typer.Option(help="Drafts of each temperature that really decode.")] = 3,
    num_prompts: Annotated[int, typer.Option(help="Prompts that they continue.")] = 12,
    rounds: Annotated[int, typer.Option(help="Times that they do; figures are medians.")] = 3,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure which draft, precision, vocabulary, length of a round and verifier decode fastest here."""
    check_json(json)
    _check(draft, data, num_tokens=num_tokens, confirm=confirm, num_prompts=num_prompts, rounds=rounds)
    from models.decode.open import open_for_decoding
    from models.decode.sampling.params import SamplingParams
    from models.elastic.granularity import Granularity
    from train.search.drafts import choices, search_drafts

    samplings = [SamplingParams(temperature=value) for value in dict.fromkeys(temperature or [0.0, 1.0])]
    folder, dtype = open_for_decoding(model, dtype)
    family = [
        *folder.family.values(),
        *(Granularity.parse(text, folder.family) for text in granularity or []),
    ]
    for one in family:
        one.resolve(folder.model.config)
    with progress_bar("searching", console=make_console(stderr=True)) as bar:
        text = _open_text(
            folder, data, samplings, num_tokens=num_tokens, num_prompts=num_prompts, progress=bar.show
        )
        result = search_drafts(
            folder.model,
            text,
            family=family,
            num_confirmed=confirm,
            num_prompts=num_prompts,
            num_rounds=rounds,
            dtype=dtype,
            progress=bar.show,
        )
    console = make_console()
    _show(result, console)
    settings = {"model": str(model), "data": data, "dtype": dtype, "num_tokens": num_tokens}
    settings |= {"num_prompts": num_prompts, "max_new_tokens": text.num_new, "rounds": rounds}
    figures = {**_figures(result), **settings}
    found = choices(result)
    _keep(folder.path, found, figures, dtype, console)
    chosen = [
        {"temperature": temperature, **plan.as_dict(), "vocabulary": _size(plan.spec)}
        for temperature, plans in found.items()
        for plan in plans
    ]
    write_results(json, {"choices": chosen, **figures}, dtypes={"model": dtype})


def _check(draft: bool, data: str, **numbers: int) -> None:
    if not draft:
        raise UsageError("--draft is missing: say what to search for, as in nestling search MODEL --draft")
    if data != "stdlib" and not data.startswith("hub:"):
        check_file("--data", Path(data))
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _open_text(
    folder: "ModelFolder",
    data: str,
    samplings: "list[SamplingParams]",
    *,
    num_tokens: int,
    num_prompts: int,
    progress: "Progress",
) -> "Text":
    """Beginnings of a fair sample of the documents, continued by the model under each temperature.

    So does `nestling bench`, and so do most who decode: within a document drafts do better, or worse. Where
    there are too few, prompts come from within.

    Raises:
        NestlingError: if the text is shorter than a prompt.
    """
    import torch

    from train.data.pack import document_starts
    from train.data.tokenizer import load_tokenizer
    from train.data.tokens import load_rows
    from train.search.measure import continue_text

    config = folder.model.config
    num_prompt = min(NUM_PROMPT, config.max_position_embeddings // 4)
    num_new = min(NUM_NEW, config.max_position_embeddings - num_prompt)
    progress("reading the text", 0, 1)
    rows = load_rows(data, load_tokenizer(str(folder.path), key="MODEL"), sequence_length=num_prompt)
    counts_V = torch.bincount(torch.from_numpy(rows.stream.astype("int64")), minlength=config.vocab_size)
    num_rows = max(num_prompts, -(-num_tokens // num_new))
    prompts_RP = torch.from_numpy(document_starts(rows.stream, num_prompt, num_rows))
    if len(prompts_RP) < num_rows:
        batches = take_batches(rows, num_rows * num_prompt)
        inside_RP = torch.cat([tokens_BT[(labels_BT >= 0).all(1)] for tokens_BT, labels_BT in batches])
        prompts_RP = torch.cat([prompts_RP, inside_RP])[:num_rows]
    if not len(prompts_RP):
        raise NestlingError(f"--data {data} has fewer than {num_prompt} tokens: give a longer text")
    progress("continuing the text", 0, 1)
    return continue_text(folder.model, prompts_RP, num_new, samplings, counts_V)


def _keep(folder: Path, found: "Plans", figures: "Mapping[str, Any]", dtype: str, console: "Console") -> None:
    """Save what was found for `--draft auto`, and say so."""
    from models.decode.tune.tuned import searched_path, write_searched
    from models.machine.provenance import make_card

    for temperature, plans in found.items():
        for plan in plans:
            sampling = "greedy" if temperature == 0 else f"T = {temperature:g}, {plan.verifier}"
            console.print(f"{sampling}: {_describe(plan)}", markup=False)
    path = searched_path(folder, dtype)
    try:
        write_searched(
            path, found, {"results": figures["results"], "card": make_card(dtypes={"model": dtype})}
        )
    except OSError as error:  # the search is not lost for that: it was shown
        console.print(f"note: it cannot be kept in {path.parent} ({error.strerror})", markup=False)
        return
    console.print(f"--draft auto of generate and bench will use this ({path})", markup=False)


def _describe(plan: "DraftPlan") -> str:
    if plan.spec is None:
        return "plain decoding"
    size = _size(plan.spec)
    few = "" if size is None else f" with the {size} most frequent tokens"
    return f"{plan.spec.text}{few}, gamma {plan.gamma}: {plan.speed}"


def _figures(result: "Result") -> dict[str, Any]:
    """The fields of docs/json.md."""
    return {
        "results": [_result(one) for one in result.confirmed],
        "estimates": [_prediction(one) for one in result.predictions],
        "v": result.slowdown,
        "num_candidates": result.num_candidates,
        "num_tried": result.num_tried,
        "busy_rounds": result.busy_rounds,
    }


def _result(one: "Confirmed") -> dict[str, Any]:
    """Return the fields of a result; plain decoding has no prediction."""
    return {
        "temperature": one.params.temperature,
        **(_prediction(one.prediction) if one.prediction else {"draft": "none", "gamma": 0}),
        "measured": one.speedup,
        "measured_tau": one.tau,
        "measured_alpha": one.alpha,
        "tokens_per_second": one.tokens_per_second,
        "error": one.prediction.plan.speed.predicted / one.speedup - 1 if one.prediction else None,
    }


def _prediction(one: "Prediction") -> dict[str, Any]:
    return {
        "temperature": one.params.temperature,
        "verifier": one.plan.verifier,
        "draft": one.spec.text,
        "vocabulary": _size(one.spec),
        "gamma": one.plan.gamma,
        "alpha": one.alpha,
        "c": one.c,
        "v": one.v,
        "tau": one.tau,
        "predicted": one.plan.speed.predicted,
    }


def _show(result: "Result", console: "Console") -> None:
    """What was confirmed, predicted beside measured."""
    from rich.table import Table

    slowdown = " ".join(f"v({m})={result.slowdown[m]:.2f}" for m in (2, 4, 8, 16, 32) if m in result.slowdown)
    console.print(
        f"{result.num_tried} of {result.num_candidates} members tried; target: {slowdown}", markup=False
    )
    table = Table(caption=_LEGEND, caption_justify="left")
    for number, column in enumerate(_HEADER):
        table.add_column(column, justify="left" if number in (1, 2) else "right", no_wrap=number != 1)
    for one in result.confirmed:
        measured = (f"{one.tau:.2f}", f"{one.speedup:.2f}")
        prediction = one.prediction
        if prediction is None:
            table.add_row(
                f"{one.params.temperature:g}", "none", *["-"] * 5, "-", measured[0], "-", "1.00", "-"
            )
            continue
        table.add_row(
            f"{one.params.temperature:g}",
            str(prediction.spec),
            "-" if one.params.is_greedy else prediction.plan.verifier,
            str(prediction.plan.gamma),
            *(f"{value:.3f}" for value in (prediction.alpha, prediction.c, prediction.v)),
            f"{prediction.tau:.2f}",
            measured[0],
            f"{prediction.plan.speed.predicted:.2f}",
            measured[1],
            f"{prediction.plan.speed.predicted / one.speedup - 1:+.0%}",
        )
    console.print(table)
    if result.busy_rounds:
        console.print(
            f"note: other programs kept the machine busy in {result.busy_rounds} rounds: "
            "search again when it is quiet",
            markup=False,
        )


_HEADER = (
    "T", "draft", "verifier", "gamma", "alpha", "c", "v",
    "tau predicted", "measured", "x plain predicted", "measured", "off by",
)  # fmt: skip
_LEGEND = (
    "alpha: chance that one drafted token is kept; c, v: a drafted token, a target pass on gamma + 1 tokens, "
    "with the host's share, in plain tokens;\ntau: tokens per target pass"
)


def _size(spec: "DraftSpec | None") -> int | None:
    return None if spec is None or spec.vocabulary is None else len(spec.vocabulary)
