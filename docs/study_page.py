"""The page of docs/study.py: a table and a picture for each corpus and length, generated from runs.json."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import altair as alt
from study_arms import ALONE, ARMS, CORPORA, DEFAULT, ROOT, SHORT, Run

from models.base.numbers import NOTHING, size
from models.base.table import Table
from train.recipe.recipe import FULL_NAME
from train.report.style import INK, Chart, styled, to_svg
from train.report.tables import flatten

RESULTS = ROOT / "docs" / "results" / "study"
FAMILY = "family-1m"
"""The result that README.md shows first."""
SHOWN = ((FULL_NAME, "loss"), ("S", "loss"), ("S", "alpha"), ("L", "loss"))
"""Its rows."""
MEASURES = {"alpha_shared": "in place", "owned_bytes": "owns"}

Found: TypeAlias = Mapping[str, Any]
"""What runs.json says of a run."""

Runs: TypeAlias = Mapping[Run, Found]

NOTE = "<!-- generated from runs.json by `python docs/study.py`; do not edit -->"
INTRODUCTION = """\
`configs/study.yaml` (1.1M parameters, 922,000 tokens unless said) is trained each time with one thing
changed: against `base`, whose members own nothing and pull at the shared weights as hard as the full model,
or against the preset `members=even`, the defaults. `gentle` and `lighter` are what `even` and `light` were at
first; `exit_stride 4, fade_to 0.1` is what the defaults were before those. Means over the seeds; "against
alone" is the mean and the standard error of the paired differences in the full model's loss, in percent. Loss
in nats per token of held-out text; alpha: expected acceptance of a drafted token, by the member's own keys
and values or, "in place", by the full model's, as it decodes. `S alone` and `D alone` are models of that
shape trained on the same tokens by themselves, the distilled ones with the full model alone as a frozen
teacher, by the loss that members learn from; their alpha is against the full model alone. "In the extra
time": on no more tokens than fit into a third of the 25 % of time that a family may cost beyond its full
model. Time: of a step, beside the full model alone. `MatFormer` is the reference recipe: each member on all
rows, cross-entropies, summed. "Unmixed": without the turns in which some layers of a member are the next
larger one's. "By logits alone": `even` before members learnt from hidden states; a quarter of its turns was
mixed, and its pull (`loss.narrow_gradient`) 0.4. "Even to a tenth": `even` when the learning rate of what
members own fell to a tenth of its peak, as all others do; now to 0.3 of it. "On more rows": `even` when
narrow members had three eighths of the rows, not a quarter, and `loss.hidden_weight` was 6, now 12 in short
runs; what is named before was measured on as many rows. "On the cache": `even` when members had half of their
rows on the full model's keys and values, not a quarter, and, in short runs, S four turns for three of L, now
five (`sampler.turns_power`); so was all that is named before. `outer_lr_ratio 0.5`: neurons that neither S
nor L has learn half as fast as the others. The learning rate, 4e-3, is the full model's best alone in so
short a run; all was first measured at half of it, where that is 2 to 4 % worse: `lr-2e-3`, below. Models of
pd_books, public-domain books, read 20 tokens a parameter, those of 1.1M and of eight layers (1.7M), where
2e-3 is as good, or two, those of 8M, at 1.5e-3; none twice. So small a model, so early in its training, shows
directions, not the size of an effect in yours."""


def read_runs(found: Iterable[Found]) -> dict[Run, Found]:
    """Return what was found of each run; runs of the recipe's length need not tell it."""
    return {Run(one["arm"], one["corpus"], one["seed"], one.get("steps", SHORT)): one for one in found}


def files(study: Mapping[str, Any]) -> dict[Path, str]:
    """Return the page and its pictures."""
    runs = read_runs(study["runs"])
    parts, page = [NOTE, "# What the defaults rest on", INTRODUCTION], {}
    for corpus in CORPORA:
        for steps in sorted({run.steps for run in runs if run.corpus == corpus}):
            here = {run: found for run, found in runs.items() if (run.corpus, run.steps) == (corpus, steps)}
            name = corpus if steps == SHORT else f"{corpus}-{steps}"
            title = f"{corpus}, {steps:,} steps of {CORPORA[corpus].batch_tokens:,} tokens"
            parts.append(f"## {title}")
            if any({"D", "L"} <= set(one["members"]) and is_compared(here, run) for run, one in here.items()):
                parts.append(f"![full model's loss and alpha]({name}.svg)")
                page[RESULTS / f"{name}.svg"] = to_svg(picture(here))
            parts.append(table(here, study.get("times", {})).to_markdown())
    card = Table(("card", ""), tuple(flatten(study["card"]).items()), num_labels=2)
    parts += [f"Trained and measured by\n\n```\n{study['command']}\n```", card.to_markdown()]
    page[RESULTS / "README.md"] = "\n\n".join(parts) + "\n"
    return page | {RESULTS.parent / f"{FAMILY}.json": json.dumps(against_alone(study, runs), indent=2) + "\n"}


def against_alone(study: Mapping[str, Any], runs: Runs) -> dict[str, Any]:
    """Return the result that README.md shows first: the family of the defaults beside models of their own."""
    corpus = next(iter(CORPORA))
    found: dict[str, dict[str, dict[int, float]]] = {}
    for member, measure in SHOWN:
        is_full = member == FULL_NAME
        arms = {"alone": ALONE if is_full else f"{member} alone", "distilled": f"{member} distilled"}
        found[f"{'full model' if is_full else member}: {measure}"] = {
            kind: by_seed(runs, arm, corpus, member, measure)
            for kind, arm in {**arms, "family": DEFAULT}.items()
        }
    seeds = [set(values) for row in found.values() for values in row.values() if values]
    everyones = set.intersection(*seeds) if seeds else set()
    rows: list[dict[str, Any]] = []
    for what, row in found.items():
        means = {
            kind: statistics.fmean(values[seed] for seed in everyones) if values and everyones else None
            for kind, values in row.items()
        }
        rows.append({"what": what, **means})
    times = {"alone": 1.0, "family": study.get("times", {}).get(DEFAULT)}
    rows.append({"what": "a training step, x the full model's", **times})
    count = len(everyones)
    title = (
        f"A family (`{DEFAULT}`) beside models of their own: TinyStories, 1.1 million parameters, "
        f"{SHORT} steps, {count} seed{'s' * (count > 1)}"
    )
    return {"title": title, "command": study["command"], "card": study["card"], "alone": rows}


def by_seed(runs: Runs, arm: str, corpus: str, member: str, measure: str) -> dict[int, float]:
    """Return seed -> what a member reached in an arm's runs of the recipe's length."""
    return {
        run.seed: one["members"][member][measure]
        for run, one in runs.items()
        if (run.arm, run.corpus, run.steps) == (arm, corpus, SHORT)
        and measure in one["members"].get(member, {})
    }


def table(runs: Runs, times: Mapping[str, float]) -> Table:
    """Return a row for each arm: means over the seeds, and the spread of the full model's loss."""
    columns = [("S", "loss"), ("S", "alpha"), ("S", "alpha_shared"), ("L", "loss"), ("L", "alpha")]
    columns += [("S", "owned_bytes"), ("D", "loss"), ("D", "alpha"), ("D", "match")]
    header = ["trained with", "seeds", "full model's loss", "against alone", "time"]
    header += [f"{member} {MEASURES.get(measure, measure)}" for member, measure in columns]
    rows = []
    for arm in ARMS:
        found = {run: one["members"] for run, one in runs.items() if run.arm == arm.name}
        if found:
            worse = [full_loss(runs, run) for run in found if is_compared(runs, run)]
            time = f"{times[arm.name]:.2f}x" if arm.name in times else NOTHING
            cells = [mean(found.values(), FULL_NAME, "loss"), spread(worse), time]
            cells += [mean(found.values(), member, measure) for member, measure in columns]
            rows.append((arm.name, str(len(found)), *cells))
    return Table(tuple(header), tuple(rows))


def is_compared(runs: Runs, run: Run) -> bool:
    """Return whether a run has a full model, and there is one that was trained alone to compare it with."""
    return FULL_NAME in runs[run]["members"] and run.of(ALONE) in runs


def full_loss(runs: Runs, run: Run) -> float:
    """Return how many percent the full model's loss is above that of the full model alone."""
    own, alone = (runs[one]["members"][FULL_NAME]["loss"] for one in (run, run.of(ALONE)))
    return 100 * (own / alone - 1)


def mean(runs: Iterable[Mapping[str, Any]], member: str, measure: str) -> str:
    """Return the mean of a member's measure over the seeds."""
    values = [run[member][measure] for run in runs if run.get(member, {}).get(measure)]
    if not values:
        return NOTHING
    average = statistics.fmean(values)
    return size(average) if measure == "owned_bytes" else f"{average:.3f}"


def spread(percents: Sequence[float]) -> str:
    """Return the mean and the standard error of the differences between paired runs, in percent.

    >>> spread([1.0, 2.0, 3.0])
    '+2.0 ± 0.6 %'
    """
    if not percents:
        return NOTHING
    error = f" ± {statistics.stdev(percents) / len(percents) ** 0.5:.1f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):+.1f}{error} %"


def picture(runs: Runs) -> Chart:
    """Draw each arm as a point: what it costs the full model, and how well its members draft."""
    rows = [
        {
            "arm": run.arm,
            "loss": full_loss(runs, run),
            **{name: found["members"][name]["alpha"] for name in "DL"},
        }
        for run, found in runs.items()
        if {"D", "L"} <= set(found["members"]) and is_compared(runs, run)
    ]
    scale = alt.Scale(zero=False, padding=30)
    panels = []
    for name in "DL":
        base = alt.Chart(alt.InlineData(values=rows)).encode(
            x=alt.X("mean(loss):Q", title="full model's loss against alone, %", scale=scale),
            y=alt.Y(f"mean({name}):Q", title=f"alpha of {name}", scale=scale),
            detail="arm:N",
        )
        points = base.mark_point(filled=True, size=60, color=INK)
        labels = base.mark_text(align="left", dx=7, fontSize=11, color=INK).encode(text="arm:N")
        panels.append(alt.LayerChart(layer=[points, labels]).properties(width=430, height=330))
    return styled(alt.hconcat(*panels, spacing=36)).properties(background="white", padding=16)
