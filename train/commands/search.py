"""`nestling search`: the draft that decodes fastest on this machine, or the best member within a budget.

See train/search/drafts.py and train/search/members.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.progress import progress_bar
from train.commands.choose import (
    BudgetOption,
    EngineOption,
    EvaluationsOption,
    LatencyOption,
    Request,
    choose,
    show,
)
from train.commands.common import check_at_least, check_data, check_json, write_results
from train.commands.console import make_console
from train.commands.options import (
    DataOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    NumPromptsOption,
    TextFieldOption,
    temperature_option,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from models.checkpoint.folder import ModelFolder
    from models.decode.tune.tuned import Plans
    from models.elastic.granularity import Granularity
    from train.search.drafts import Result


DraftOption = Annotated[
    bool, typer.Option("--draft", help="Search for the fastest draft, which --draft auto then takes.")
]
NumTokensOption = Annotated[
    int | None,
    typer.Option(help="Number of tokens to measure on. Default: 4096 for a draft, 16384 for a budget."),
]
TemperaturesOption = Annotated[list[float] | None, temperature_option("0 and 1")]
GranularitiesOption = Annotated[
    list[str] | None,
    typer.Option(metavar="G", help="Granularity to consider besides the family; repeatable."),
]
ConfirmOption = Annotated[
    int, typer.Option(help="Number of drafts that are confirmed by decoding, for each temperature.")
]
RoundsOption = Annotated[int, typer.Option(help="Number of rounds, of which medians are shown.")]


def search(
    model: ModelArgument,
    *,
    draft: DraftOption = False,
    budget: BudgetOption = None,
    engine: EngineOption = None,
    latency_table: LatencyOption = None,
    evaluations: EvaluationsOption = 60,
    data: DataOption,
    text_field: TextFieldOption = None,
    num_tokens: NumTokensOption = None,
    temperature: TemperaturesOption = None,
    granularity: GranularitiesOption = None,
    confirm: ConfirmOption = 3,
    num_prompts: NumPromptsOption = 12,
    rounds: RoundsOption = 3,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Measure which draft, precision, vocabulary, length of a round and verifier decode fastest here.

    That is --draft. With --budget, find the members of every size that lose least, trained or not: which
    layers run, and the width of each.
    """
    check_json(json, MODEL=model, data=data, latency_table=latency_table)
    of_drafts = {"granularity": granularity, "temperature": temperature}
    _check_alone(draft, budget, engine=engine, latency_table=latency_table, **of_drafts)
    if budget and not draft:
        _search_members(
            model,
            Request(
                budgets=budget,
                data=data,
                text_field=text_field,
                engine=engine,
                latency_table=latency_table,
                max_tokens=16384 if num_tokens is None else num_tokens,
                evaluations=evaluations,
            ),
            json,
        )
        return
    num_tokens = 4096 if num_tokens is None else num_tokens
    _check(draft, data, num_tokens=num_tokens, confirm=confirm, num_prompts=num_prompts, rounds=rounds)
    from models.decode.open import open_for_decoding
    from models.decode.sampling.params import SamplingParams
    from train.search.drafts import search_drafts
    from train.search.text import open_text

    samplings = [SamplingParams(temperature=value) for value in dict.fromkeys(temperature or [0.0, 1.0])]
    folder, dtype = open_for_decoding(model, dtype)
    family = _candidates(folder, granularity or [])
    with progress_bar("searching", console=make_console(stderr=True)) as bar:
        text = open_text(
            folder,
            data,
            samplings,
            text_field=text_field,
            num_tokens=num_tokens,
            num_prompts=num_prompts,
            progress=bar.show,
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
    num_rows = min(len(rows_RT) for rows_RT in text.rows.values())  # a short text has fewer than asked for
    settings = {"model": str(model), "data": data, "dtype": dtype, "num_tokens": num_rows * text.num_new}
    settings |= {"num_prompts": min(num_prompts, num_rows), "max_new_tokens": text.num_new, "rounds": rounds}
    _finish(folder.path, result, settings, json)


def _candidates(folder: "ModelFolder", texts: "Sequence[str]") -> "list[Granularity]":
    """Return the family and the members of these texts; each must fit the model."""
    from models.elastic.granularity import Granularity

    found = [*folder.family.values(), *(Granularity.parse(text, folder.family) for text in texts)]
    for one in found:
        one.resolve(folder.model.config)
    return found


def _finish(folder: Path, result: "Result", settings: dict[str, Any], json: Path | None) -> None:
    """Show what was found, and keep it for `--draft auto`."""
    from train.search.drafts import choices
    from train.search.results import choice_fields, result_fields

    plans, console, dtype = choices(result), make_console(), settings["dtype"]
    document = {"choices": choice_fields(plans), **result_fields(result), **settings}
    _show(result, plans, console)
    _keep(folder, plans, document["results"], dtype, console)
    write_results(json, document, dtypes={"model": dtype})


def _search_members(model: Path, request: Request, json: Path | None) -> None:
    from train.report.frontier import keep_frontier

    chosen, console = choose(model, request), make_console()
    show(chosen, console)
    try:
        kept = keep_frontier(model, chosen.fields)
    except OSError:  # the search is not lost for that: it was shown
        kept = None
    if kept is not None:
        console.print(f"nestling report {kept.parent} will show it", markup=False)
    write_results(json, chosen.fields, dtypes={"model": "fp32"})


def _check_alone(draft: bool, budget: list[str] | None, **flags: object) -> None:
    if draft and budget:
        raise UsageError("--draft and --budget are two searches; give one of them")
    for name, value in flags.items():
        is_of_drafts = name in ("granularity", "temperature")
        if value is not None and (budget if is_of_drafts else draft):
            flag = "for" if name == "engine" else name.replace("_", "-")
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            ours, theirs = ("--draft", "--budget") if is_of_drafts else ("--budget", "--draft")
            raise UsageError(f"--{flag} {shown} goes with {ours}, not with {theirs}; leave it out")


def _check(draft: bool, data: str, **numbers: int) -> None:
    if not draft:
        raise UsageError(
            "--draft is missing: say what to search for, as in nestling search MODEL --draft, or --budget "
            "params=0.5"
        )
    check_data(data)
    check_at_least(1, **numbers)


def _show(result: "Result", plans: "Plans", console: "Console") -> None:
    from train.search.results import LEGEND, describe_plans, headline, result_table

    console.print(headline(result), markup=False)
    console.print(result_table(result).to_rich(caption=LEGEND))
    if result.busy_rounds:
        note = f"other programs kept the machine busy in {result.busy_rounds} rounds"
        console.print(f"note: {note}: search again when it is quiet", markup=False)
    for line in describe_plans(plans):
        console.print(line, markup=False)


def _keep(folder: Path, plans: "Plans", results: list[Any], dtype: str, console: "Console") -> None:
    """Save what was found for `--draft auto`, and say so."""
    from models.decode.tune.tuned import searched_path, write_searched
    from models.machine.provenance import make_card

    path = searched_path(folder, dtype)
    try:
        write_searched(path, plans, {"results": results, "card": make_card(dtypes={"model": dtype})})
    except OSError as error:  # the search is not lost for that: it was shown
        console.print(f"note: it cannot be kept in {path.parent} ({error.strerror})", markup=False)
        return
    console.print(f"--draft auto of generate and bench will use this ({path})", markup=False)
