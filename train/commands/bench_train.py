"""`nestling bench --train`: what training a family costs here; see train/bench/train_bench.py.

Recipe keys are given as for `nestling train`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import UsageError
from models.base.progress import progress_bar
from train.commands.common import ConfigOption, JsonOption, check_file, check_json
from train.commands.console import make_console
from train.commands.train import check_sources

if TYPE_CHECKING:
    from train.bench.train_bench import TrainingBench


def bench_train(
    context: typer.Context,
    *,
    config: ConfigOption = None,
    rounds: Annotated[int, typer.Option(help="Times that everybody trains; figures are medians.")] = 3,
    steps: Annotated[int, typer.Option(help="Timed optimizer steps of each in a round.")] = 8,
    json: JsonOption = None,
) -> None:
    """Measure training: the family, the full model alone, and transformers.Trainer.

    Recipe keys follow as KEY=VALUE, --KEY=VALUE or --KEY VALUE.
    """
    check_json(json)
    for flag, value in (("--rounds", rounds), ("--steps", steps)):
        if value < 1:
            raise UsageError(f"{flag} must be at least 1, got {value}")
    for file in config or []:
        check_file("--config", file)
    from train.recipe.recipe import load_recipe

    recipe = load_recipe(config or [], context.args)
    recipe.elastic_config()  # sizes that do not fit are told before anything runs
    check_sources(recipe)
    from train.bench.train_bench import bench_training, choose_contenders

    console = make_console(stderr=True)
    contenders, _ = choose_contenders(recipe, "fp32")
    with progress_bar("training", len(contenders) * (rounds + 1), console=console) as bar:
        bench = bench_training(recipe, rounds=rounds, steps=steps, console=console, progress=bar.advance)
    _finish(bench, json)


def _finish(bench: "TrainingBench", path: Path | None) -> None:
    """A card, a table, notes, and one last line of JSON: the object that --json writes."""
    import json

    from models.base.files import write_json
    from models.machine.provenance import make_card
    from train.report.tables import training_table

    settings, card = bench.settings, make_card(dtypes={"training": bench.settings["dtype"]})
    document: dict[str, Any] = {"results": bench.results, **settings, "notes": bench.notes, "card": card}
    console = make_console()
    console.print(
        f"{settings['parameters']:,} parameters, {settings['rows_per_step']} rows of "
        f"{settings['sequence_length']} tokens a step, {settings['dtype']}, {settings['threads']} threads, "
        f"{card['hardware']['gpu'] or card['hardware']['cpu']}; a matrix product reaches "
        f"{settings['roof_gflops']:,.0f} GFLOP/s",
        markup=False,
        highlight=False,
    )
    console.print(training_table(bench.results).to_rich(caption=_LEGEND))
    for note in bench.notes:
        console.print(f"note: {note}", markup=False)
    if path is not None:
        write_json(path, document)
    print(json.dumps(document, ensure_ascii=False))


_LEGEND = (
    "x full: against nestling full; MFU: of the rate of a matrix product; of it training: above what the "
    "process held before"
)
