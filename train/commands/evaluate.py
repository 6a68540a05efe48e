"""`nestling evaluate`: how well each member models a text, and how close it is to the full model."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from models.base.errors import UsageError
from train.commands.common import (
    DataOption,
    JsonOption,
    ModelArgument,
    TextFieldOption,
    check_data,
    check_json,
    open_for_measuring,
    write_results,
)
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity

# Long enough for any model that was trained here; a stock one's context may be far longer than needed.
MAX_SEQUENCE_LENGTH = 1024


def evaluate(
    model: ModelArgument,
    *,
    data: DataOption,
    text_field: TextFieldOption = None,
    granularity: Annotated[
        list[str] | None,
        typer.Option(metavar="G", help="Granularity to measure besides the family; repeatable."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Approximate number of tokens to measure on; 0 takes all.")
    ] = 100_000,
    dtype: Annotated[
        str, typer.Option(metavar="auto|fp32|bf16|int8", help="Data type of the weights.")
    ] = "fp32",
    json: JsonOption = None,
) -> None:
    """Measure every member of a family on a text: loss, perplexity, match, KL and alpha."""
    check_json(json, MODEL=model, data=data)
    check_data(data)
    if max_tokens < 0:
        raise UsageError(f"--max-tokens must be 0 (all) or more, got {max_tokens}")
    from models.measure.consistency import evaluate_family
    from train.data.loader import take_batches
    from train.data.tokens import load_rows_for
    from train.report.tables import FAMILY_LEGEND, family_table

    folder, dtype = open_for_measuring(model, dtype)
    members = choose_members(folder, granularity or [])
    rows = load_rows_for(folder, data, longest=MAX_SEQUENCE_LENGTH, text_field=text_field)
    console = make_console()
    with console.status("measuring"):
        batches = list(take_batches(rows, max_tokens or rows.num_labels))
        measured = evaluate_family(folder.model, members, batches)
    num_tokens = sum(int((labels_BT >= 0).sum()) for _, labels_BT in batches)
    title = f"{model} on {num_tokens:,} of {rows.num_labels:,} tokens of {data}, {dtype}"
    console.print(family_table(measured).to_rich(title=title, caption=FAMILY_LEGEND))
    results = {
        "members": [dataclasses.asdict(member) for member in measured],
        "data": data,
        "num_tokens": num_tokens,
        "sequence_length": rows.sequence_length,
    }
    write_results(json, results, dtypes={"model": dtype})


def choose_members(folder: "ModelFolder", texts: list[str]) -> "dict[str, Granularity]":
    """Return the family and the members of these texts, by name; the largest last.

    Raises:
        UsageError: if one does not fit the model.
    """
    from models.elastic.count import count_parameters
    from models.elastic.granularity import Granularity

    members = {text: Granularity.parse(text, folder.family) for text in texts}
    members = {**folder.family, **{text: one for text, one in members.items() if text not in folder.family}}
    config = folder.model.config
    return dict(sorted(members.items(), key=lambda item: count_parameters(config, item[1])))
