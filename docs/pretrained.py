"""Collects finished runs that began from given weights, and writes the tables of docs/pretrained.md.

python docs/pretrained.py add NAME RUN...   add runs, each of its own number of tokens, to the series NAME
python docs/pretrained.py                   write the tables from docs/results/pretrained/runs.json
python docs/pretrained.py --check           exit with 1 if the page says something else

The last row of a table continues the line through the two longest runs over the logarithm of the tokens.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoint.family import FAMILY_FILE
from models.checkpoint.weights import hash_weights
from train.recipe.recipe import FULL_NAME
from train.run.metrics import read_metrics

PAGE = Path(__file__).with_name("pretrained.md")
RESULTS = PAGE.parent / "results" / "pretrained" / "runs.json"
BEGIN, END = "<!-- ladder:begin -->\n", "<!-- ladder:end -->"
DECODING = RESULTS.with_name("decoding.json")
DECODING_TITLE = """SmolLM2-135M-Instruct with a draft in place, greedily, on the first turns of MT-Bench by
the chat template, 128 new tokens, prefill included; the median over prompts of how many times as fast it is
(by docs/pretrained_decode.py). Rows of one thread have processor time, beside other programs (Zen 4);
those of two threads the clock's, on a machine that did nothing else (Zen 5):"""
UNTRAINED = 1e-20
"""A learning rate below this changes no weight: such a run has the members as they came."""

Point = dict[str, Any]


def read_points(run: Path) -> Iterator[Point]:
    """Yield what was measured in a run: at each validation of one that was stopped, else at its end."""
    model = run / "model" / FAMILY_FILE
    if model.is_file():
        content = json.loads(model.read_text())
        recipe, lines = content["provenance"]["recipe"], read_metrics(run / "metrics.jsonl")
        trainer, is_trained = recipe["trainer"], recipe["optim"]["lr"] > UNTRAINED
        rows = trainer["max_steps"] * trainer["batch_size"] * trainer["accumulate_grad_batches"]
        yield {
            "tokens": rows * recipe["data"]["sequence_length"] * is_trained,
            "minutes": max(clock(lines), default=0.0) / 60 * is_trained,
            "members": {one["name"]: _measured(one) for one in content["members"]},
            "weights": hash_weights(run / "model"),
            "card": _without_paths(content["provenance"]["card"]),
        }
        return
    lines = read_metrics(run / "metrics.jsonl")
    for line, seconds in zip(lines, clock(lines), strict=True):
        if line.get("kind") == "valid":
            names = [key.split("/")[1] for key in line if key.endswith("/alpha")]
            measured = {
                name: {kind: line[f"valid/{name}/{kind}"] for kind in ("loss", "alpha")} for name in names
            }
            yield {"tokens": line["tokens"], "minutes": seconds / 60, "members": measured}


def clock(lines: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Yield the seconds that a run had trained at each of its lines; one that goes on counts from 0 again."""
    earlier = latest = 0.0
    for line in lines:
        now = line.get("seconds", latest)
        earlier += latest if now < latest else 0.0
        latest = now
        yield earlier + now


def _without_paths(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card whose command names files, and not where they lie on somebody's machine."""
    command = re.sub(r"(?:/[\w.-]+)+/", "", card["command"]).removeprefix("-c ")
    return {**card, "command": f"nestling {command.removeprefix('nestling ')}"}


def _measured(member: Mapping[str, Any]) -> dict[str, Any]:
    return {name: member[name] for name in ("granularity", "loss", "alpha")}


def table(points: Sequence[Point]) -> str:
    """Return a series as Markdown, the shortest run first."""
    points = sorted(points, key=lambda point: float(point["tokens"]))
    names = [name for name in points[-1]["members"] if name != FULL_NAME]
    header = ["tokens", "minutes", "full model", *names]
    rows = [header, ["---"] * len(header)]
    for point in points:
        members = point["members"]
        shown = [f"{members[name]['loss']:.2f} / {members[name]['alpha']:.3f}" for name in names]
        rows.append([_tokens(point["tokens"]), f"{point['minutes']:.0f}", _loss(members), *shown])
    trained = [point for point in points if point["tokens"]]
    if len(trained) > 1:
        goal = 4 * trained[-1]["tokens"]
        ahead = [f"{extrapolate(trained, name, goal):.2f}" for name in names]
        rows.append([f"{_tokens(goal)}, extrapolated", "", "", *(f"/ {alpha}" for alpha in ahead)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def extrapolate(trained: Sequence[Point], member: str, tokens: float) -> float:
    """Return alpha on the line through the two longest runs, over the logarithm of the tokens."""
    (x0, y0), (x1, y1) = ((math.log(p["tokens"]), p["members"][member]["alpha"]) for p in trained[-2:])
    return min(1.0, float(y1 + (y1 - y0) / (x1 - x0) * (math.log(tokens) - x1)))


def decoding_table(points: Sequence[Point]) -> str:
    """Return what docs/pretrained_decode.py measured as Markdown, under a title."""
    header = ["draft", "tokens", "target", "threads", "head", "drafted a round", "prompts"]
    header += ["tau", "accepted", "plain tokens/s", "drafted", "times"]
    rows = [header, ["---"] * len(header)]
    for one in points:
        speeds = [f"{one[name]:.0f}" for name in ("plain_tokens_per_second", "tokens_per_second")]
        head = f"{one['vocabulary']:,} tokens" if one["vocabulary"] else "whole"
        shown = [f"{one['tau']:.2f}", f"{one['alpha']:.3f}", *speeds, f"{one['speedup']:.2f}"]
        name = f"{one['layers']} layers {one['draft']}"
        about = [name, _tokens(one["tokens"]), one["dtype"], str(one["threads"]), head, str(one["gamma"])]
        rows.append([*about, str(one["prompts"]), *shown])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{DECODING_TITLE}\n\n{lines}\n"


def _loss(members: Mapping[str, Any]) -> str:
    return f"{members[FULL_NAME]['loss']:.3f}" if FULL_NAME in members else ""


def _tokens(count: float) -> str:
    return "0" if not count else f"{count / 1e6:.2g}M" if count >= 1e5 else f"{count / 1e3:.0f}k"


def page_with(series: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page with the tables of all series."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    parts = [f"{one['title']}\n\n{table(one['points'])}\n" for one in series.values()]
    if DECODING.is_file():
        parts.append(decoding_table(json.loads(DECODING.read_text())))
    return before + BEGIN + "\n".join(parts) + END + after


def main(arguments: Sequence[str]) -> int:
    """Run a command of the module's docstring."""
    series: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if arguments and arguments[0] == "add":
        name, *runs = arguments[1:]
        one = series.setdefault(name, {"title": name, "points": []})
        one["points"] = [point for run in runs for point in read_points(Path(run))]
        RESULTS.write_text(json.dumps(series, indent=1) + "\n")
    text = page_with(series)
    if "--check" in arguments:
        return int(text != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
