"""Measures what members that a search finds are worth, on the text of the search and on another one.

python docs/extraction.py MODEL --data TEXT --name NAME --budget params=0.5 [--budget ...]
python docs/extraction.py            writes docs/results/extraction/README.md from runs.json
python docs/extraction.py --check    exits with 1 if the page says something else

For each budget the search compares members on the first --num-tokens of a shuffle of the text, and the chosen
one, the best of the paper's heuristic and the trained members are compared again on the --check-tokens that
follow: what was chosen for losing least on one text is flattered there. "To the line": loss above the line
between the two trained members that goes lowest at this cost. Distances are of tokens in pairs, each with its
standard error.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nestling
from models.base.errors import NestlingError
from models.base.files import read_json, write_json
from models.base.table import Table
from models.checkpoint.folder import ModelFolder
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL
from models.machine.provenance import make_card
from models.measure.token_losses import TokenLosses
from train.commands.choose import MAX_SEQUENCE_LENGTH, open_text
from train.report.results import bring_up_to_date, not_current
from train.report.tables import flatten
from train.search.found import Found, Result

RESULTS = Path(__file__).parent / "results" / "extraction"
NOTE = "<!-- generated from runs.json by `python docs/extraction.py`; do not edit -->"
INTRODUCTION = """\
`nestling search MODEL --budget` on families, and what it found beside trained members and the paper's
heuristic (MatFormer's Mix'n'Match: widths that never fall with depth and rise by one trained step). Losses in
nats per token. "Predicted" is what the search expected before it measured the member. "To the line": loss
above the line between the two trained members that goes lowest at this cost; below 0, the member found is
better than any that was trained, and than any mixture of two. "Beside the heuristic": above the heuristic's
best member within the budget. Both with the standard error of the paired differences. The search chose on one
text; "elsewhere" is another part of the same corpus, which it had not seen."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="the family; without it the page is written")
    parser.add_argument("--data", help="text that the family was not trained on")
    parser.add_argument("--text-field", help="field of the text")
    parser.add_argument("--name", help="name of the family on the page")
    parser.add_argument("--budget", action="append", default=[], help="such as params=0.5; repeatable")
    parser.add_argument("--num-tokens", type=int, default=16384, help="tokens of the search")
    parser.add_argument("--check-tokens", type=int, default=16384, help="tokens of the comparison elsewhere")
    parser.add_argument("--evaluations", type=int, default=60, help="members to measure, at most")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if out of date")
    options = parser.parse_args(arguments)
    runs = read_json(RESULTS / "runs.json") if (RESULTS / "runs.json").exists() else {}
    if options.model is not None:
        try:
            run = measure(options)
        except NestlingError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        runs = {**runs, options.name: run}
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / "runs.json", runs)
    stale = not_current({RESULTS / "README.md": page(runs)})
    return bring_up_to_date(stale, check=options.check, command="python docs/extraction.py")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Search under each budget, and compare what was found elsewhere."""
    start, found = time.process_time(), []
    for budget in options.budget:
        result = nestling.search(
            options.model,
            options.data,
            [budget],
            text_field=options.text_field,
            max_tokens=options.num_tokens,
            evaluations=options.evaluations,
        )
        found.append((budget, result))
    seconds = time.process_time() - start
    folder, elsewhere = other_text(options)
    rows = [row_of(budget, result, elsewhere) for budget, result in found]
    ranks = [result.rank_correlation for _, result in found]
    command = f"python docs/extraction.py MODEL --data TEXT --name {shlex.quote(options.name)} "
    command += " ".join(f"--budget {budget}" for budget in options.budget)
    command += f" --num-tokens {options.num_tokens} --check-tokens {options.check_tokens}"
    card = make_card(dtypes={"model": "fp32"})
    del card["command"]  # it names places on one machine; the one here stands for it
    return {
        "command": f"{command} --evaluations {options.evaluations}",
        "parameters": count_parameters(folder.model.config),
        "family": {name: str(member) for name, member in folder.family.items()},
        "budgets": rows,
        "rank_correlation": ranks,
        "prediction_error": [result.prediction_error for _, result in found],
        "last_prediction_error": [result.last_error for _, result in found],
        "num_measured": [result.num_measured for _, result in found],
        "search_cpu_seconds": round(seconds),
        "card": card,
    }


def other_text(options: argparse.Namespace) -> tuple[ModelFolder, TokenLosses]:
    """Return the family, and its losses on the rows behind those of the search."""
    folder, batches = open_text(
        options.model, options.data, options.text_field, options.num_tokens + options.check_tokens
    )
    tokens_BT, labels_BT = (torch.cat(list(parts)) for parts in zip(*batches, strict=True))
    seen = math.ceil(options.num_tokens / min(tokens_BT.shape[1], MAX_SEQUENCE_LENGTH))
    return folder, TokenLosses(folder.model, split(tokens_BT[seen:], labels_BT[seen:]))


def split(tokens_BT: Tensor, labels_BT: Tensor, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Return a few rows at a time."""
    return list(zip(tokens_BT.split(rows), labels_BT.split(rows), strict=True))


def row_of(budget: str, result: Result, elsewhere: TokenLosses) -> dict[str, Any]:
    """Return what was found under one budget."""
    best, kind = result.best, budget.partition("=")[0]
    assert best is not None
    heuristic = next((one for one in result.margins if one.other.origin == "heuristic"), None)
    trained = [one for one in result.found if one.origin == "trained" or one.name]
    line = result.line(kind, best.costs[kind])
    full = next(one for one in result.found if one.member == FULL)
    return {
        "budget": budget,
        "granularity": str(best.member),
        "from": best.origin,
        "cost": best.costs[kind],
        "of_full": best.costs[kind] / full.costs[kind],
        "predicted": best.predicted,
        "loss": best.loss,
        "to_line": None if line is None else best.loss - line,
        "beside_heuristic": None if heuristic is None else _fields(heuristic.difference),
        "heuristic": None if heuristic is None else str(heuristic.other.member),
        "elsewhere": {
            "num_tokens": elsewhere.num_tokens,
            "loss": elsewhere.mean(best.member),
            "to_line": beside_line(best, trained, kind, elsewhere),
            "beside_heuristic": None
            if heuristic is None
            else _fields(elsewhere.compare(best.member, heuristic.other.member)),
        },
        "members": [
            {"granularity": str(one.member), "from": one.origin, "cost": one.costs[kind], "loss": one.loss}
            for one in result.found
        ],
    }


def _fields(difference: Any) -> dict[str, float]:
    return {"mean": difference.mean, "error": difference.error}


def beside_line(
    best: Found, trained: Sequence[Found], kind: str, losses: TokenLosses
) -> dict[str, float] | None:
    """Return how much a member loses above the lowest line between two trained ones, with its error."""
    lines = []
    for one, other in itertools.permutations(trained, 2):
        low, high, cost = one.costs[kind], other.costs[kind], best.costs[kind]
        if low <= cost <= high and low < high:
            part = (cost - low) / (high - low)
            low_N, high_N = (losses.losses(end.member).double() for end in (one, other))
            lines.append((1 - part) * low_N + part * high_N)
    if not lines:
        return None
    line_N = min(lines, key=lambda one: float(one.mean()))
    apart_N = losses.losses(best.member).double() - line_N
    return {"mean": float(apart_N.mean()), "error": float(apart_N.std()) / math.sqrt(len(apart_N))}


def page(runs: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [NOTE, "# What a search under a budget finds", INTRODUCTION]
    for name, run in runs.items():
        members = ", ".join(f"{one} `{text}`" for one, text in run["family"].items())
        ranks = ", ".join("-" if one is None else f"{one:.2f}" for one in run["rank_correlation"])
        errors = ", ".join(f"{one:.4f}" for one in run["prediction_error"])
        last = ", ".join(f"{one:.4f}" for one in run["last_prediction_error"])
        told = (
            f"{run['parameters']:,} parameters; {members}. Predicted and measured losses of unequal members: "
            f"rank correlation {ranks}; {errors} nats apart on average, {last} in the last round. Members "
            f"measured anew: {', '.join(map(str, run['num_measured']))}; the searches took "
            f"{run['search_cpu_seconds']:,} seconds of a processor's time."
        )
        card = Table(("card", ""), tuple(flatten(run["card"]).items()), num_labels=2)
        command = f"```\n{run['command']}\n```"
        parts += [f"## {name}", told, table(run["budgets"]).to_markdown(), command, card.to_markdown()]
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each budget."""
    chosen = ("budget", "member found", "of full", "predicted", "loss", "to the line", "beside the heuristic")
    header = (*chosen, "elsewhere: to the line", "elsewhere: beside the heuristic")
    return Table(header, tuple(_row(one) for one in rows), num_labels=2)


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    elsewhere = one["elsewhere"]
    return (
        one["budget"],
        f"`{one['granularity']}`",
        f"{one['of_full']:.1%}",
        "-" if one["predicted"] is None else f"{one['predicted']:.4f}",
        f"{one['loss']:.4f}",
        "-" if one["to_line"] is None else f"{one['to_line']:+.4f}",
        _told(one["beside_heuristic"]),
        _told(elsewhere["to_line"]),
        _told(elsewhere["beside_heuristic"]),
    )


def _told(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['mean']:+.4f} +- {found['error']:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
