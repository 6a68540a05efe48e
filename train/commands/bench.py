"""`nestling bench`: ours against transformers on the same weights, side by side; see models/bench/run.py."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from models.base.progress import progress_bar
from train.commands.common import JsonOption, check_file, check_gamma, check_json, check_plot
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.bench.contenders import Target
    from models.bench.report import Row


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="A model folder: a run's model/, or any stock one."),
    ] = None,
    *,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G[@int4|int8|bf16]|auto|none|DIR",
            help="What drafts: a member, the best one here, nothing, or another model folder; repeatable. "
            "Default: auto; layers=0-1 with --random.",
        ),
    ] = None,
    gamma: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Drafted tokens a round; auto: ours follow what they measure, as in generate. "
            "Default: the number that --draft auto finds best, or 4.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="Prompts, one a line, as field prompt, turns or text."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Or a text: the first 32 tokens of its documents."),
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="At most so many prompts.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write; ends of text are ignored.")] = 64,
    temperature: Annotated[
        list[float] | None, typer.Option(help="0 takes the likeliest token; repeatable. Default: 0.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="auto|fp32|bf16|int8", help="Of the weights; repeatable. Default: auto."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Times that everything runs; figures are medians.")] = 5,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="nestling|transformers|llama.cpp",
            help="What runs beside ours; repeatable. nestling: ours alone. Default: all.",
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Also transformers compiled (static cache): takes minutes more and a C++ compiler.",
        ),
    ] = False,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="15M|60M|125M|350M|1B",
            help="No MODEL but random weights of this size, whose draft is accepted as --alpha says.",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Share of drafted tokens that --random's model keeps. Default: 0.8."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Also draw the speeds: an .svg, .png or .html file."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Measure plain and speculative decoding, ours and that of transformers, on the same weights."""
    check_json(json)
    check_plot(plot)
    _check_numbers(num_prompts=num_prompts, max_new_tokens=max_new_tokens, rounds=rounds)
    number = check_gamma(gamma, least=1)
    _check_source(model, random, alpha, prompts, data)
    from models.base.processor import peak_memory_bytes
    from models.bench.report import make_notes, make_rows
    from models.bench.run import run_cells
    from models.decode.sampling.params import SamplingParams
    from train.bench.contenders import DEFAULT_EXIT, BenchSettings, folder_contest, random_contest

    console = make_console(stderr=True)
    with _quiet_transformers(), tempfile.TemporaryDirectory(prefix="nestling-bench-") as scratch:
        options = BenchSettings(
            drafts=draft or [DEFAULT_EXIT if random else "auto"],
            gamma=number,
            num_prompts=num_prompts,
            max_new_tokens=max_new_tokens,
            samplings=[SamplingParams(temperature=value) for value in dict.fromkeys(temperature or [0.0])],
            dtypes=dtype or ["auto"],
            compiled=compiled,
            engines=_engines(engine),
            scratch=Path(scratch),
        )
        with console.status("preparing"):
            if random:
                contest = random_contest(random, DEFAULT_ALPHA if alpha is None else alpha, options)
            else:
                assert model is not None
                contest = folder_contest(model, options, prompts=prompts, data=data)
        cells, prompt_ids = contest.cells, contest.prompt_ids
        with progress_bar("decoding", len(cells) * (1 + rounds * len(prompt_ids)), console=console) as bar:
            runs = run_cells(
                cells, prompt_ids, max_new_tokens=max_new_tokens, num_rounds=rounds, progress=bar.advance
            )
    rows = make_rows(runs)
    settings = {
        **contest.about,
        "num_prompts": len(prompt_ids),
        "num_prompt_tokens": sum(map(len, prompt_ids)),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "busy_rounds": sum(runs.busy),
        "threads": {target.dtype: target.num_threads for target in contest.targets},
        "peak_memory_bytes": peak_memory_bytes(),
        "notes": contest.notes + make_notes(rows, runs, num_prompts=len(prompt_ids)),
    }
    _add_utilisation(rows, contest.targets[0], settings)
    _finish(make_console(), json, plot, {"results": rows, **settings})


DEFAULT_ALPHA = 0.8


def _engines(asked: list[str] | None) -> Sequence[str]:
    from models.bench.contenders import ENGINES

    for name in asked or ():
        if name not in ENGINES:
            raise UsageError(f"--engine {name} is none; choose from {', '.join(ENGINES)}")
    return asked or ENGINES


def _check_numbers(*, num_prompts: int, max_new_tokens: int, rounds: int) -> None:
    for flag, value, least in (
        ("--num-prompts", num_prompts, 1),
        ("--max-new-tokens", max_new_tokens, 2),  # decoding alone begins with the second
        ("--rounds", rounds, 1),
    ):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, got {value}")


def _check_source(
    model: Path | None, random: str | None, alpha: float | None, prompts: Path | None, data: str | None
) -> None:
    """One model, and one source of prompts that goes with it."""
    if (model is None) == (random is None):
        given = f"MODEL {model} and --random {random} exclude each other" if model else "there is no MODEL"
        raise UsageError(f"{given}; give a model folder, or --random with a size such as 125M")
    text = {"--prompts": prompts, "--data": data}
    asked = [f"{flag} {value}" for flag, value in text.items() if value is not None]
    if random and asked:
        raise UsageError(f"{asked[0]} has no effect with --random, whose prompts are random tokens; leave it")
    if alpha is not None and (random is None or not 0 < alpha < 1):
        raise UsageError(f"--alpha {alpha:g}: give a share between 0 and 1, together with --random")
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} exclude each other; give one of them")
    if prompts:
        check_file("--prompts", prompts)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep off the screen what it warns of: its own use of its own settings."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    theirs.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        theirs.set_verbosity(before)


def _add_utilisation(rows: "Sequence[Row]", target: "Target", settings: Mapping[str, Any]) -> None:
    from models.bench.report import add_utilisation
    from models.machine.card import machine_card

    card = machine_card()
    if not card.busy:  # a bandwidth that others shared is no yardstick
        mean_prompt = settings["num_prompt_tokens"] / settings["num_prompts"]
        add_utilisation(
            rows,
            target.model.config,
            num_positions=mean_prompt + settings["max_new_tokens"] / 2,
            read_gbps=card.device.read_gbps,
        )


def _finish(console: Console, path: Path | None, plot: Path | None, results: Mapping[str, Any]) -> None:
    """A card, a table, notes, and one last line of JSON: the object that --json writes."""
    import json

    from models.base.files import write_json
    from models.base.table import facts_table
    from models.bench.report import LEGEND, facts, speed_table
    from models.machine.provenance import make_card

    card = make_card(dtypes={"model": " and ".join(results["threads"])})
    table = speed_table(results["results"], num_prompts=results["num_prompts"])
    console.print(facts_table(facts(results, card)).to_rich())
    console.print(table.to_rich(caption=LEGEND))
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False)
    document = {**results, "card": card}
    if path is not None:
        write_json(path, document)
    if plot is not None:
        from train.report.speed import speed_chart
        from train.report.style import save_chart

        save_chart(speed_chart(results["results"], results["model"]), plot)
    print(json.dumps(document, ensure_ascii=False))
