"""`nestling bench`: the speed of decoding, or of training; see train/bench/.

With `--train`, a recipe takes the place of the model: its keys are given as for `nestling train`.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from models.base.outputs import check_apart
from models.base.paths import shown
from train.commands.common import (
    add_card,
    check_at_least,
    check_file,
    check_gamma,
    check_json,
    check_plot,
    check_recipes,
    draft_paths,
    write_document,
)
from train.commands.console import make_console
from train.commands.options import (
    DTYPES,
    ConfigOption,
    JsonOption,
    NumPromptsOption,
    PromptsOption,
    TextFieldOption,
    draft_option,
    gamma_option,
    temperature_option,
)

Show = Callable[[Mapping[str, Any], Console], None]
MODELS, TRAINING = "What decodes", "Training"
BOTH = {"train", "rounds", "json", "config", "steps"}
"""Parameters that `--train` takes; it alone takes the last two."""
SERVED = {
    *("model", "serve", "rounds", "json", "draft", "gamma", "dtype"),
    *("prompts", "num_prompts", "max_new_tokens", "temperature"),
}
"""Parameters that `--serve` takes."""
ModelOrKeys = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Model folder; with --train, recipe keys as KEY=VALUE."),
]
DraftsOption = Annotated[list[str] | None, draft_option("auto; layers=0-1 with --random", several=True)]
GammaOption = Annotated[str | None, gamma_option("the number that --draft auto finds best, or 4")]
TemperaturesOption = Annotated[list[float] | None, temperature_option("0")]
EnginesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="nestling|transformers|llama.cpp",
        rich_help_panel=MODELS,
        help="Engine to compare with; repeatable. nestling measures nothing else. Default: all.",
    ),
]
DtypesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar=DTYPES,
        rich_help_panel=MODELS,
        help="Data type of the weights; repeatable. Default: auto.",
    ),
]
CompiledOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        rich_help_panel=MODELS,
        help="Also measure transformers under torch.compile; takes minutes more and a C++ compiler.",
    ),
]
RandomOption = Annotated[
    str | None,
    typer.Option(
        metavar="15M|60M|125M|350M|1B",
        rich_help_panel=MODELS,
        help="Size of a model with random weights to measure instead of MODEL.",
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=MODELS,
        help="Fraction of drafted tokens that the random model accepts. Default: 0.8.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Text whose documents' first 32 tokens are the prompts, instead of --prompts.",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option(help="Number of tokens to generate for each text; end tokens are ignored.")
]
RoundsOption = Annotated[
    int | None,
    typer.Option(help="Number of rounds, of which medians are shown. Default: 5; 3 with --train."),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="File to draw the speeds in: .svg, .png or .html."),
]
TrainOption = Annotated[
    bool,
    typer.Option(
        "--train",
        rich_help_panel=TRAINING,
        help="Measure training instead: the family, the full model alone, and transformers.Trainer.",
    ),
]
ServeOption = Annotated[
    bool,
    typer.Option(
        "--serve",
        help="Measure a server instead: nestling serve MODEL, by the number of its clients.",
    ),
]
StepsOption = Annotated[
    int, typer.Option(rich_help_panel=TRAINING, help="Number of timed optimizer steps in a round.")
]


def bench(
    context: typer.Context,
    model: ModelOrKeys = None,
    *,
    rounds: RoundsOption = None,
    json: JsonOption = None,
    draft: DraftsOption = None,
    engine: EnginesOption = None,
    dtype: DtypesOption = None,
    compiled: CompiledOption = False,
    random: RandomOption = None,
    alpha: AlphaOption = None,
    gamma: GammaOption = None,
    prompts: PromptsOption = None,
    data: DataOption = None,
    text_field: TextFieldOption = None,
    num_prompts: NumPromptsOption = 8,
    max_new_tokens: MaxNewTokensOption = 64,
    temperature: TemperaturesOption = None,
    plot: PlotOption = None,
    serve: ServeOption = False,
    train: TrainOption = False,
    config: ConfigOption = None,
    steps: StepsOption = 8,
) -> None:
    """Measure decoding, plain and speculative, ours and that of other engines; or, with --train, training."""
    inputs = {"prompts": prompts, "data": data, "draft": draft_paths(draft), "config": config}
    inputs |= {} if train else {"MODEL": model}
    check_json(json, **inputs)
    _check_flags(context, train)
    num_rounds = (3 if train else 5) if rounds is None else rounds
    check_at_least(1, rounds=num_rounds, num_prompts=num_prompts)
    check_at_least(2, max_new_tokens=max_new_tokens)
    if train:
        _bench_training([*([model] if model else []), *context.args], config or [], num_rounds, steps, json)
        return
    check_plot(plot, json=json, **inputs)
    if serve:
        _check_served(context, model)
        served = {
            "drafts": draft or ["auto"],
            "max_new_tokens": max_new_tokens,
            "gamma": gamma,
            "temperature": (temperature or [0.0])[0],
            "dtype": (dtype or ["auto"])[0],
            "rounds": num_rounds if rounds else 2,
        }
        _bench_serving(Path(model or ""), served, prompts, num_prompts, json)
        return
    _check_source(model, random, alpha, {"--prompts": prompts, "--data": data}, text_field)
    from models.decode.sampling.params import SamplingParams
    from train.bench.contenders import DEFAULT_EXIT, BenchSettings
    from train.bench.decode_bench import bench_decoding

    settings = BenchSettings(
        drafts=draft or [DEFAULT_EXIT if random else "auto"],
        gamma=check_gamma(gamma, least=1),
        num_prompts=num_prompts,
        max_new_tokens=max_new_tokens,
        samplings=[SamplingParams(temperature=value) for value in dict.fromkeys(temperature or [0.0])],
        dtypes=dtype or ["auto"],
        compiled=compiled,
        engines=_engines(engine),
        text_field=text_field,
    )
    results = bench_decoding(
        settings,
        model=Path(model) if model else None,
        random=random,
        alpha=alpha,
        prompts=prompts,
        data=data,
        rounds=num_rounds,
        console=make_console(stderr=True),
    )
    _show_decoding(results, json, plot)


def _show_decoding(results: Mapping[str, Any], json: Path | None, plot: Path | None) -> None:
    from train.bench.decode_bench import show_decoding

    _finish(results, show_decoding, json, model=" and ".join(results["threads"]))
    if plot is not None:
        from train.report.speed import speed_chart
        from train.report.style import save_chart

        save_chart(speed_chart(results["results"], shown(results["model"])), plot)


def _bench_serving(
    model: Path, settings: Mapping[str, Any], prompts: Path | None, num_prompts: int, json: Path | None
) -> None:
    from models.decode.prompts import HEADINGS, read_prompts
    from train.bench.serve_bench import ServeSettings, bench_serving, show_serving

    texts = [one.text for one in read_prompts(prompts, num_prompts)] if prompts else HEADINGS[:num_prompts]
    results = bench_serving(
        ServeSettings(**settings, prompts=texts),
        model=model,
        console=make_console(stderr=True),
    )
    _finish(results, show_serving, json, model=settings["dtype"])


def _bench_training(
    words: Sequence[str], files: Sequence[Path], rounds: int, steps: int, json: Path | None
) -> None:
    from train.commands.train import check_flags, check_sources
    from train.recipe.recipe import load_recipe

    check_at_least(1, steps=steps)
    check_recipes(files)
    check_flags(words)
    recipe = load_recipe(files, words)
    recipe.elastic_config()  # sizes that do not fit are told before anything runs
    check_sources(recipe)
    sources = {"data.source": recipe.data.source, "data.valid": recipe.data.valid}
    check_apart({"--json": json}, {**sources, "loss.teacher": recipe.loss.teacher})
    from train.bench.train_bench import bench_training, show_training

    results = bench_training(recipe, rounds=rounds, steps=steps, console=make_console(stderr=True))
    _finish(results, show_training, json, training=results["dtype"])


def _finish(results: Mapping[str, Any], show: "Show", json: Path | None, **dtypes: str) -> None:
    """Show the results with their card, and write them."""
    show(document := add_card(results, dtypes=dtypes), make_console())
    write_document(json, document)


def _check_flags(context: typer.Context, train: bool) -> None:
    """Refuse what the other half of the command takes, and flags that neither knows."""
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        given = source is not None and source.name == "COMMANDLINE" and param.name != "model"
        if given and train and param.name not in BOTH:
            raise UsageError(f"{param.opts[0]} has no effect with --train; leave one of them out")
        if given and not train and param.name in ("config", "steps"):
            raise UsageError(f"{param.opts[0]} has an effect with --train only; add it, or leave this out")
    if context.args and not train:
        word = context.args[0].partition("=")[0]
        flags = [flag for one in context.command.params for flag in one.opts]
        near = difflib.get_close_matches(word, flags, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"No such option: {word}{hint} (see nestling bench --help)")


def _check_served(context: typer.Context, model: str | None) -> None:
    """Refuse what has no effect on a server."""
    if model is None:
        raise UsageError("--serve needs a MODEL; give a model folder")
    for param in context.command.params:
        source = context.get_parameter_source(param.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and param.name not in SERVED:
            raise UsageError(f"{param.opts[0]} has no effect with --serve; leave one of them out")
        values = context.params.get(param.name or "")
        if param.name in ("temperature", "dtype") and values is not None and len(values) > 1:
            shown = f"{param.opts[0]} {' '.join(map(str, values))}"
            raise UsageError(f"{shown}: --serve measures one at a time; give one")


def _engines(names: list[str] | None) -> Sequence[str]:
    from models.bench.contenders import ENGINES

    for name in names or ():
        if name not in ENGINES:
            raise UsageError(f"--engine {name} is not an engine; choose from {', '.join(ENGINES)}")
    return names or ENGINES


def _check_source(
    model: str | None,
    random: str | None,
    alpha: float | None,
    texts: Mapping[str, Path | str | None],
    text_field: str | None,
) -> None:
    """Check that there is one model, and one source of prompts that goes with it."""
    if (model is None) == (random is None):
        given = f"MODEL {model} and --random {random} exclude each other" if model else "there is no MODEL"
        raise UsageError(f"{given}; give a model folder, or --random with a size such as 125M")
    sources = [f"{flag} {value}" for flag, value in texts.items() if value is not None]
    if random and sources:
        raise UsageError(
            f"{sources[0]} has no effect with --random, whose prompts are random tokens; leave it"
        )
    if alpha is not None and (random is None or not 0 < alpha < 1):
        raise UsageError(f"--alpha {alpha:g}: give a fraction between 0 and 1, together with --random")
    if len(sources) > 1:
        raise UsageError(f"{sources[0]} and {sources[1]} exclude each other; give one of them")
    if text_field is not None and texts["--data"] is None:
        raise UsageError(f"--text-field {text_field}: has no effect without --data; give one of its files")
    if (prompts := texts["--prompts"]) is not None:
        check_file("--prompts", Path(prompts))
