"""The page's sections: what stands in them for one run, and for several."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from models.base.errors import NestlingError
from models.base.numbers import NOTHING, duration, si
from models.base.table import Table
from train.report import figures, markup
from train.report.frontier import KEY
from train.report.read import Run
from train.report.samples import compare
from train.report.tables import family_table, flatten, speed_table

FAMILY = "Every row is a model that can be cut out of the full one, as measured on validation text."
SIZES = "Members that a search measured, trained or not: which layers run, and the width of each."
SPEED = "Plain decoding against speculative decoding with a nested draft, on the same weights."
SAMPLES = "Every member continues the same text greedily. Marked: what the full model does not say there."


def sections(runs: Sequence[Run]) -> str:
    """Return the body of the page; a section without content is left out."""
    key = figures.make_key(runs)
    drawn = figures.family_figures(runs, key)
    return "".join(
        [
            markup.section("At a glance", _glance(runs)),
            markup.section("The family", markup.grid(drawn, key), _each(runs, _family), lead=FAMILY),
            markup.section("Every size", _each(runs, _frontier), lead=SIZES),
            markup.section("Decoding speed", _speeds(runs), lead=SPEED),
            markup.section("Loss", markup.grid(figures.loss_figures(runs, key), key)),
            markup.section(
                "Closeness to the full model", markup.grid(figures.consistency_figures(runs, key), key)
            ),
            markup.section("Gradients", markup.grid(figures.gradient_figures(runs, key), key)),
            markup.section("Samples", _each(runs, _samples), lead=SAMPLES),
            markup.section(
                "Training", markup.grid(figures.machine_figures(runs, key), key if len(runs) > 1 else None)
            ),
            markup.section("Provenance", _differences(runs), _each(runs, _provenance)),
        ]
    )


def _each(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
    """Return a part of every run, under the run's name if there are several."""
    contents = [(run.name, part(run)) for run in runs]
    names = [f"<h3>{escape(name)}</h3>" if len(runs) > 1 else "" for name, _ in contents]
    return "".join(name + content for name, (_, content) in zip(names, contents, strict=True) if content)


def _glance(runs: Sequence[Run]) -> str:
    every = [_facts(run) for run in runs]
    if len(runs) == 1:
        return markup.facts(every[0])
    columns = list(dict.fromkeys(name for facts in every for name in facts))
    rows = (
        (run.name, *(facts.get(name, NOTHING) for name in columns))
        for run, facts in zip(runs, every, strict=True)
    )
    return Table(("run", *columns), tuple(rows)).to_html()


def _facts(run: Run) -> dict[str, str]:
    facts: dict[str, str] = {}
    for member in run.members:
        if member.name == run.full and member.loss is not None:
            facts["Loss, full model"] = f"{member.loss:.3f}"
    drafts = [
        (member.alpha, member.name) for member in run.members if member.name != run.full and member.alpha
    ]
    if drafts:
        alpha, name = max(drafts)
        facts["Highest alpha"] = f"{alpha:.3f} ({name})"
    last = max([*run.train, *run.valid], key=lambda line: int(line["step"]))
    facts["Steps"] = f"{last['step']:,}"
    facts["Training tokens"] = si(last["tokens"])
    if run.seconds:
        facts["Training time"] = duration(run.seconds)
    speeds = sorted(line["tokens_per_second"] for line in run.train if line.get("tokens_per_second"))
    if speeds:
        facts["Median tokens/s"] = si(speeds[len(speeds) // 2])
    return facts


def _family(run: Run) -> str:
    return family_table(run.members).to_html(emphasis=run.full)


def _frontier(run: Run) -> str:
    return markup.grid(figures.frontier_figures(run), KEY)


def _speeds(runs: Sequence[Run]) -> str:
    rows: list[dict[str, Any]] = []
    for run in runs:
        measured = run.decode
        if "plain_tokens_per_second" in measured and "speculative_tokens_per_second" in measured:
            shared = {name: measured.get(name) for name in ("dtype", "temperature")}
            shared |= {"run": run.name} if len(runs) > 1 else {}
            drafted = {name: measured.get(name) for name in ("draft", "tau", "alpha")}
            for mode, more in (("plain", {}), ("speculative", drafted)):
                rows.append(
                    {"mode": mode, "tokens_per_second": measured[f"{mode}_tokens_per_second"]} | shared | more
                )
    return speed_table(rows).to_html()


def _samples(run: Run) -> str:
    """Return the last sample of each member, by prompt."""
    last = {(line["prompt"], line["member"]): line["text"] for line in run.samples}
    parts = []
    for prompt in dict.fromkeys(prompt for prompt, _ in last):
        texts = {member: text for (of, member), text in last.items() if of == prompt}
        reference = texts.get(run.full or "")
        cards = [
            markup.sample(
                name, compare(texts[name], texts[name] if reference is None else reference), name == run.full
            )
            for name in sorted(texts, key=lambda name: (name != run.full, run.member_names.index(name)))
        ]
        parts.append(f'<pre class="prompt">{escape(prompt)}</pre><div class="samples">{"".join(cards)}</div>')
    return "".join(parts)


def _provenance(run: Run) -> str:
    known = {name: value for name, value in run.provenance.items() if name != "recipe"}
    rows = tuple(flatten(known).items())
    recipe = markup.details("Resolved recipe", f"<pre>{escape(run.recipe)}</pre>") if run.recipe else ""
    return Table(("what", "value"), rows, num_labels=2).to_html() + recipe


def _differences(runs: Sequence[Run]) -> str:
    """Return the recipe's keys whose values are not the same in all runs."""
    if len(runs) == 1:
        return ""
    recipes = [flatten(_recipe(run)) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, *(recipe.get(key, NOTHING) for recipe in recipes)) for key in keys]
    different = tuple(row for row in rows if len(set(row[1:])) > 1)
    content = Table(("recipe", *(run.name for run in runs)), different, num_labels=len(runs) + 1)
    return f"<h3>Where the recipes differ</h3>{content.to_html()}" if different else ""


def _recipe(run: Run) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        values = OmegaConf.to_container(OmegaConf.create(run.recipe))
    except YAMLError as error:
        raise NestlingError(f"recipe.yaml of run {run.name} is not YAML ({error}); restore it") from None
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
