"""`nestling order`: sort the neurons and heads of a dense model, so that its prefixes are good members."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from models.base.numbers import duration
from models.base.outputs import check_apart
from models.base.progress import progress_bar
from train.commands.common import check_data, check_json, check_made_by, open_for_measuring, write_results
from train.commands.console import make_console
from train.commands.options import DataOption, JsonOption, ModelArgument, TextFieldOption

if TYPE_CHECKING:
    from torch import Tensor

    from models.checkpoint.folder import ModelFolder
    from models.elastic.granularity import Granularity
    from models.elastic.model import ElasticLM
    from models.measure.importance import Importance

WIDTHS = (0.75, 0.5, 0.25)
"""Fractions of the neurons whose loss is compared between orders."""
AS_IT_CAME = "as it came"
SEQUENCE_LENGTH = 512
LOSS_TOKENS = 1024
"""Tokens on which losses are compared: orders differ by far more than so few leave open (docs/LOG.md)."""
PASSES_OF_AN_ORDER = 3.2
"""Passes of the full model that the loss of all prefixes takes, `full` among them."""


def order(
    model: ModelArgument,
    *,
    data: DataOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New model folder.")],
    text_field: TextFieldOption = None,
    rule: Annotated[
        str,
        typer.Option(
            metavar="best|contribution|activation|magnitude",
            help="Measure of importance. best takes the one whose prefixes have the lowest loss on the text.",
        ),
    ] = "best",
    drop: Annotated[
        int | None,
        typer.Option(help="Number of layers to drop, one by one. By default an eighth of them."),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(help="Approximate number of tokens to measure importance on; losses take at most 1024."),
    ] = 4096,
    json: JsonOption = None,
) -> None:
    """Sort neurons and heads by importance and find the layers that matter least; the full model stays."""
    check_json(json, MODEL=model, data=data, out=out)
    check_apart({"--out": out}, {"MODEL": model, "--data": data})
    check_made_by("order", "ordered_from", out)
    check_data(data)
    from models.checkpoint.folder import save_model
    from models.measure.order import RULES, check_same, order_model

    if rule not in ("best", *RULES):
        raise UsageError(f"--rule {rule} is not one of best, {', '.join(RULES)}; choose one of them")
    folder, _ = open_for_measuring(model, "fp32")
    num_layers = folder.model.config.num_hidden_layers
    drop = num_layers // 8 if drop is None else drop
    if not 0 <= drop < num_layers:
        raise UsageError(
            f"--drop {drop} must be 0 to {num_layers - 1}, since the model has {num_layers} layers"
        )
    console, waiting = make_console(), make_console(stderr=True)
    batches, scored = _batches(folder, data, text_field, max_tokens)
    _tell_time(folder.model, batches, scored, drop, console)
    importance, losses = _compare(folder.model, batches, scored, waiting)
    chosen = _best(losses) if rule == "best" else rule
    ordered = folder.model if chosen == AS_IT_CAME else order_model(folder.model, importance, chosen)
    difference = check_same(folder.model, ordered, batches[0][0])
    layers = _drop_layers(ordered, importance, scored, drop, waiting)
    save_model(
        out,
        ordered,
        tokenizer=folder.tokenizer,
        family=_family(folder, layers),
        provenance={**folder.provenance, "ordered_from": str(folder.path), "ordered_by": chosen},
        chat_template=folder.chat_template,
        like=folder.path,
    )
    _show(console, losses, layers, chosen)
    if folder.model.members and not ordered.members:
        names = ", ".join(one.name for one in folder.model.members)
        console.print(f"what {names} owned is left out: they have other neurons now; train them again")
    console.print(
        f"{out}: ordered by {chosen}; the full model's greedy tokens are the same, its logits differ by "
        f"{difference:.1g} of the largest",
        markup=False,
    )
    results = {
        "rule": chosen,
        "losses": losses,
        "dropped": [{"layers": str(kept), "loss": loss} for kept, loss in layers],
        "difference": difference,
        "data": data,
        "out": str(out),
    }
    write_results(json, results, dtypes={"model": "fp32"})


def _batches(
    folder: "ModelFolder", data: str, text_field: str | None, max_tokens: int
) -> "tuple[list[Any], list[Any]]":
    """Return the text for importance, and the part of it for losses."""
    from train.data.loader import take_batches
    from train.data.tokens import load_rows_for

    rows = load_rows_for(folder, data, longest=SEQUENCE_LENGTH, text_field=text_field)
    return list(take_batches(rows, max_tokens)), list(take_batches(rows, min(max_tokens, LOSS_TOKENS)))


def _tell_time(
    model: "ElasticLM", batches: "list[Any]", scored: "list[Any]", drop: int, console: Console
) -> None:
    """Say how long it will take, by the time of one pass."""
    import torch

    from models.measure.order import CANDIDATES, RULES

    tokens_BT = scored[0][0][:1]
    started = perf_counter()
    with torch.inference_mode():
        model(tokens_BT.to(model.device))
    each = (perf_counter() - started) / tokens_BT.numel()
    measured, compared = (sum(tokens_BT.numel() for tokens_BT, _ in part) for part in (batches, scored))
    passes = PASSES_OF_AN_ORDER * (1 + len(RULES)) + drop * (1 + CANDIDATES)
    told = f"about {duration(each * (measured + passes * compared))}; --max-tokens and --drop make it shorter"
    console.print(told, markup=False, highlight=False)


def _compare(
    model: "ElasticLM", batches: "list[Any]", scored: "list[Any]", console: Console
) -> "tuple[Importance, dict[str, dict[str, float]]]":
    """Return the importance, and the loss of each prefix in each order."""
    from models.elastic.granularity import FULL, Granularity
    from models.measure.consistency import evaluate_family
    from models.measure.importance import measure_importance
    from models.measure.order import RULES, order_model

    members = {f"ffn={width}": Granularity(ffn=(width,)) for width in WIDTHS} | {"full": FULL}
    losses: dict[str, dict[str, float]] = {}

    def counted() -> Iterator["Tensor"]:
        for tokens_BT, _ in batches:
            yield tokens_BT
            bar.advance()

    total = len(batches) + (1 + len(RULES)) * len(scored)
    with progress_bar("measuring", total, console=console) as bar:
        importance = measure_importance(model, counted())
        for name in (AS_IT_CAME, *RULES):
            ordered = model if name == AS_IT_CAME else order_model(model, importance, name)
            measured = evaluate_family(ordered, members, scored, progress=bar.advance)
            losses[name] = {member.name: member.loss or 0.0 for member in measured}
    return importance, losses


def _best(losses: dict[str, dict[str, float]]) -> str:
    return min(losses, key=lambda name: sum(losses[name].values()))


def _drop_layers(
    model: "ElasticLM", importance: "Importance", batches: "list[Any]", count: int, console: Console
) -> "list[tuple[Granularity, float]]":
    """Return what is left after each drop, and its loss."""
    from models.measure.consistency import evaluate_family
    from models.measure.order import drop_layers

    measured: dict[tuple[int, ...], float] = {}
    with progress_bar("dropping layers", count * len(batches), console=console) as bar:

        def losses_of(choices: Sequence[tuple[int, ...]]) -> list[float]:
            family = {str(layers): _running(layers) for layers in choices}
            losses = [
                member.loss or 0.0 for member in evaluate_family(model, family, batches, progress=bar.advance)
            ]
            measured.update(zip(choices, losses, strict=True))
            return losses

        steps = drop_layers(model.config.num_hidden_layers, importance, losses_of, count)
    return [(_running(layers), measured[layers]) for layers in steps]


def _running(layers: tuple[int, ...]) -> "Granularity":
    from models.elastic.granularity import Granularity

    return Granularity(layers=layers)


def _family(folder: "ModelFolder", layers: "list[tuple[Granularity, float]]") -> "dict[str, Granularity]":
    """Return the folder's family, with the best of fewer layers beside it, by a name that is free."""
    if not layers:
        return folder.family
    fewest = layers[-1][0]
    name = f"D{folder.model.config.num_hidden_layers - len(layers)}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return {next(one for one in names if folder.family.get(one, fewest) == fewest): fewest, **folder.family}


def _show(
    console: Console,
    losses: dict[str, dict[str, float]],
    layers: "list[tuple[Granularity, float]]",
    chosen: str,
) -> None:
    from models.base.table import Table

    members = tuple(next(iter(losses.values())))
    rows = tuple((name, *(f"{of[member]:.3f}" for member in members)) for name, of in losses.items())
    table = Table(("order", *members), rows)
    console.print(table.to_rich(title=f"loss of prefixes, nats per token; chosen: {chosen}"))
    for kept, loss in layers:
        console.print(f"{kept}: {loss:.3f} nats per token", markup=False, highlight=False)
