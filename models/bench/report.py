"""From timings to rows: one for each cell, as JSON objects and as a table of texts.

A row has its cell's label and:

    tokens_per_second, _range           prefill included: median over rounds, [least, most]
    decode_tokens_per_second, _range    of what came after the first target pass, by the time after it
    speedup, decode_speedup             ratio of these medians to ours plain (same dtype, temperature)
    seconds_to_first_token              median over rounds of the mean over prompts
    tau                                 tokens per target pass, the first pass left out
    alpha                               expected acceptance of a drafted token (ours only)
    num_identical                       greedy: prompts whose ids are those of ours plain
    best                                whether it is the fastest of its engine and mode (same dtype,
                                        temperature), whatever cache, draft or schedule
    mbu                                 plain: bytes read per second, as a fraction of the bandwidth
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from models.base.dtypes import DTYPES
from models.base.numbers import NOTHING, fixed, optional, percent, size
from models.base.table import Table
from models.bench.contenders import Label
from models.bench.engines import Sample
from models.bench.run import Runs
from models.elastic.config import ElasticConfig
from models.elastic.count import count_kv_bytes, count_weight_bytes

Row = dict[str, Any]

KIND = ("dtype", "temperature")
"""Rows that differ in these are not compared."""
OURS = ("nestling", "speculative")


def make_rows(runs: Runs) -> list[Row]:
    """Return one row for each cell; `mbu` is for `add_utilisation` to fill in."""
    plain = {
        (label.dtype, label.temperature): rounds
        for label, rounds in runs.samples.items()
        if (label.engine, label.mode) == ("nestling", "plain")
    }
    rows = [
        _row(label, rounds, plain[label.dtype, label.temperature]) for label, rounds in runs.samples.items()
    ]
    for row in rows:
        row["best"] = row is _fastest(rows, **{name: row[name] for name in (*KIND, "engine", "mode")})
    return rows


def add_utilisation(
    rows: Sequence[Row], config: ElasticConfig, *, num_positions: float, read_gbps: float
) -> None:
    """Fill in `mbu` of plain rows: weights and cached keys and values are read once for each token.

    Args:
        rows: rows of `make_rows`.
        config: the model's.
        num_positions: in the cache, on average.
        read_gbps: the machine's bandwidth, in 1e9 bytes per second. Weights that stay in the processor's
            caches can exceed it.
    """
    for row in rows:
        if row["mode"] == "plain":
            num_bytes = bytes_per_token(config, num_positions=num_positions, dtype=row["dtype"])
            row["mbu"] = row["decode_tokens_per_second"] * num_bytes / (read_gbps * 1e9)


def bytes_per_token(config: ElasticConfig, *, num_positions: float, dtype: str) -> float:
    """Return the bytes that plain decoding reads for a token; of an embedding that is no head, one row.

    In int8 weights take a byte, and keys and values are in bf16.
    """
    stored = DTYPES.get(dtype, DTYPES["bf16"]).itemsize
    weight = stored if dtype in DTYPES else 1
    num_bytes = count_weight_bytes(config, dtype_bytes=weight)
    if not config.tie_word_embeddings:
        num_bytes -= (config.vocab_size - 1) * config.hidden_size * weight
    return num_bytes + num_positions * count_kv_bytes(config, num_positions=1, dtype_bytes=stored)


def make_notes(rows: Sequence[Row], runs: Runs, *, num_prompts: int) -> list[str]:
    """Return notes that a reader of the figures must know."""
    notes = [
        f"{_name(row)}: greedy ids equal those of nestling plain on {row['num_identical']} of {num_prompts} "
        "prompts only; a near-tie of two logits can do that, a bug as well"
        for row in rows
        if row["dtype"] == "fp32" and row["num_identical"] not in (None, num_prompts)
    ]
    notes += [_comparison(row, rows) for row in rows if (row["engine"], row["mode"]) == OURS and row["best"]]
    if any(runs.busy):
        notes.append(
            f"other programs kept the machine busy in {sum(runs.busy)} of {len(runs.busy)} rounds: "
            "figures are too low and ratios unsure; measure again when it is quiet"
        )
    return notes


def speed_table(rows: Sequence[Row], *, num_prompts: int) -> Table:
    """Return the rows as a table, in their order."""
    return Table(HEADER, tuple(_texts(row, num_prompts) for row in rows), num_labels=3)


def facts(results: Mapping[str, Any], card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return where the figures come from, in words: rows of name and value.

    Args:
        results: results of `nestling bench`.
        card: of `models.machine.provenance.make_card`.
    """
    hardware, versions = card["hardware"], card["versions"]
    gpu = f", {hardware['gpu']}" if hardware["gpu"] else ""
    counts = {(row["dtype"], row["engine"]): row["threads"] for row in results["results"]}
    threads = ", ".join(f"{dtype} {engine} {count}" for (dtype, engine), count in counts.items())
    mean_prompt = results["num_prompt_tokens"] / results["num_prompts"]
    work = (
        f"{results['num_prompts']} prompts of {mean_prompt:.0f} tokens on average from {results['prompts']}, "
        f"{results['max_new_tokens']} new tokens each, {results['rounds']} rounds; "
        f"others were busy in {results['busy_rounds']}"
    )
    return [
        ("model", results["model"]),
        ("command", card["command"]),
        ("commit", card["commit"] or "unknown"),
        ("hardware", f"{hardware['cpu']}, {hardware['cores']} cores{gpu}; {hardware['system']}"),
        ("threads", threads),
        ("memory", f"{size(results['peak_memory_bytes'])} at most"),
        ("versions", ", ".join(f"{name} {versions[name]}" for name in VERSIONS if name in versions)),
        ("date", card["date"]),
        ("work", work),
    ]


VERSIONS = ("nestling", "torch", "transformers", "llama-cpp-python", "python")

BEST = "*"
"""Mark behind the speed of the best row of its engine and mode."""

LEGEND = (
    "tokens/s: prefill included, median over rounds and its range; decode: after the first target pass; "
    "x plain: against nestling plain\n*: the fastest of its engine and mode; gamma: drafted tokens a round, "
    "auto or the schedule of transformers; tau: tokens per target pass\nread: of the memory's bandwidth; "
    "same: prompts whose greedy tokens are those of nestling plain"
)

HEADER = (
    "engine",
    "mode",
    "draft",
    "gamma",
    "T",
    "dtype",
    "tokens/s",
    "range",
    "x plain",
    "decode",
    "x plain",
    "first token",
    "tau",
    "alpha",
    "read",
    "same",
)


def _row(label: Label, rounds: Sequence[Sequence[Sample]], plain: Sequence[Sequence[Sample]]) -> Row:
    samples = [sample for prompts in rounds for sample in prompts]
    return {
        **dataclasses.asdict(label),
        **_figures("", list(map(_speed, rounds)), list(map(_speed, plain))),
        **_figures("decode_", list(map(_decode_speed, rounds)), list(map(_decode_speed, plain))),
        "seconds_to_first_token": statistics.median(
            statistics.fmean(sample.first_seconds for sample in prompts) for prompts in rounds
        ),
        "tau": _ratio(_num_decoded(samples), sum(sample.passes for sample in samples)),
        "alpha": _ratio(sum(sample.overlap for sample in samples), sum(sample.reached for sample in samples)),
        "num_identical": _num_identical(rounds, plain) if label.temperature == 0 else None,
        "best": False,
        "mbu": None,
    }


def _fastest(rows: Sequence[Row], **fields: Any) -> Row | None:
    """Return the fastest of the rows with these fields."""
    found = [row for row in rows if all(row[name] == value for name, value in fields.items())]
    return max(found, key=lambda row: row["tokens_per_second"], default=None)


def _comparison(row: Row, rows: Sequence[Row]) -> str:
    """Compare our best drafted decoding with the best that each engine offers."""
    kind = {name: row[name] for name in KIND}
    others = [
        (engine, mode)
        for engine, mode in dict.fromkeys((other["engine"], other["mode"]) for other in rows)
        if (engine, mode) != OURS
    ]
    best = [found for engine, mode in others if (found := _fastest(rows, **kind, engine=engine, mode=mode))]
    ratios = [
        f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}x {_name(other)}" for other in best
    ]
    return f"{row['dtype']}, T={row['temperature']:g}: {_name(row)} is {', '.join(ratios)}"


def _figures(prefix: str, by_round: Sequence[float | None], plain: Sequence[float | None]) -> Row:
    """Return median, range and speed-up of one kind of speed; nulls where some round has none."""
    ours, theirs = ([speed for speed in speeds if speed is not None] for speeds in (by_round, plain))
    known = len(ours) == len(by_round) and len(theirs) == len(plain)
    return {
        f"{prefix}tokens_per_second": statistics.median(ours) if known else None,
        f"{prefix}tokens_per_second_range": [min(ours), max(ours)] if known else None,
        f"{prefix}speedup": statistics.median(ours) / statistics.median(theirs) if known else None,
    }


def _speed(samples: Sequence[Sample]) -> float:
    return sum(len(sample.ids) for sample in samples) / sum(sample.seconds for sample in samples)


def _decode_speed(samples: Sequence[Sample]) -> float | None:
    """Return None where the first target pass gave all tokens, as it can where a draft comes before it."""
    seconds = sum(sample.seconds - sample.first_seconds for sample in samples)
    return (_num_decoded(samples) / seconds) or None


def _num_decoded(samples: Sequence[Sample]) -> int:
    return sum(len(sample.ids) - sample.first_tokens for sample in samples)


def _num_identical(rounds: Sequence[Sequence[Sample]], plain: Sequence[Sequence[Sample]]) -> int:
    """Count the prompts whose every round gave the ids of the first plain one."""
    return sum(
        all(samples[number].ids == first.ids for samples in rounds) for number, first in enumerate(plain[0])
    )


def _ratio(amount: float, count: int) -> float | None:
    return amount / count if count else None


def _name(row: Mapping[str, Any]) -> str:
    words = [row["engine"], row["mode"], row["cache"], row["draft"] and f"by {row['draft']}", row["schedule"]]
    words.append(row["gamma"] and f"({row['gamma']})")
    return " ".join(word for word in words if word)


def _texts(row: Row, num_prompts: int) -> tuple[str, ...]:
    least, most = row["tokens_per_second_range"]
    return (
        row["engine"],
        " ".join(word for word in (row["mode"], row["cache"]) if word),
        row["draft"] or NOTHING,
        str(row["gamma"] or row["schedule"] or NOTHING),
        f"{row['temperature']:g}",
        row["dtype"],
        f"{row['tokens_per_second']:.1f}{BEST if row['best'] else ''}",
        f"{least:.1f}-{most:.1f}",
        f"{row['speedup']:.2f}",
        optional(row["decode_tokens_per_second"], fixed(1)),
        optional(row["decode_speedup"], fixed(2)),
        f"{row['seconds_to_first_token'] * 1e3:.1f} ms",
        optional(row["tau"], fixed(2)),
        optional(row["alpha"], fixed(3)),
        optional(row["mbu"], percent),
        optional(row["num_identical"], lambda count: f"{count}/{num_prompts}"),
    )
