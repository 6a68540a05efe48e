"""The tables of results: a family, ways of decoding, ways of training."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from models.base.numbers import NOTHING, fixed, optional, percent, si, size
from models.base.table import Columns, Table
from models.checkpoint.family import Member

FAMILY_LEGEND = (
    "loss: nats per token. Against the full model: match (equal greedy\n"
    "tokens), KL (nats), alpha (chance that a token it drafts is kept)"
)


def task_table(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Return scores: member -> task -> measure -> number."""
    columns = list(
        dict.fromkeys(
            (task, measure) for tasks in scores.values() for task, one in tasks.items() for measure in one
        )
    )
    header = ("member", *(f"{task} {measure}" for task, measure in columns))
    rows = tuple(
        (name, *(optional(tasks.get(task, {}).get(measure), fixed(4)) for task, measure in columns))
        for name, tasks in scores.items()
    )
    return Table(header, rows)


def family_table(members: Sequence[Member]) -> Table:
    """Return a row for each member, the largest first; a column that nobody measured is left out."""
    ordered = sorted(members, key=lambda member: -member.parameters)
    columns: Columns = {
        "name": ("member", str),
        "granularity": ("granularity", str),
        "parameters": ("parameters", si),
        "loss": ("loss", fixed(3)),
        "perplexity": ("perplexity", fixed(2)),
        "match": ("match", fixed(1, " %")),
        "kl": ("KL", fixed(3)),
        "alpha": ("alpha", fixed(3)),
        "owned": ("of its own", size),
    }
    rows = [{**asdict(member), "owned": member.owned_bytes or None} for member in ordered]
    return Table.of(rows, columns, labels=("name", "granularity"))


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each way of decoding; speed-up is against the engine's fastest plain decoding.

    Args:
        rows: fields `run`, `engine`, `mode`, `draft`, `cache`, `schedule`, `gamma`, `dtype`, `temperature`,
            `tokens_per_second`, `seconds_to_first_token`, `tau`, `alpha` and `mbu`, all but one of them
            optional.
    """
    columns: Columns = {
        "run": ("run", str),
        "engine": ("engine", str),
        "mode": ("mode", str),
        "draft": ("draft", str),
        "setting": ("setting", str),
        "dtype": ("dtype", str),
        "temperature": ("temperature", str),
        "tokens_per_second": ("tokens/s", fixed(1)),
        "speed_up": ("speed-up", fixed(2, "×")),
        "seconds_to_first_token": ("first token", lambda value: f"{1e3 * value:.1f} ms"),
        "tau": ("tau", fixed(2)),
        "alpha": ("alpha", fixed(3)),
        "mbu": ("bandwidth", percent),
    }
    filled = [{**row, "setting": setting(row) or None, "speed_up": _speed_up(row, rows)} for row in rows]
    names = ("run", "engine", "mode", "draft", "setting", "dtype")
    return Table.of(filled, columns, labels=names)


def brief_speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return two rows for each engine, plain decoding and its fastest other way, in the first row's setting.

    Args:
        rows: as `speed_table` takes them; those of another dtype or temperature than the first are left out.
    """
    same = [row for row in rows if all(row.get(key) == rows[0].get(key) for key in ("dtype", "temperature"))]
    best: dict[tuple[str, bool], Mapping[str, Any]] = {}
    for row in sorted(same, key=lambda row: -row["tokens_per_second"]):
        best.setdefault((row["engine"], row["mode"] == "plain"), row)
    columns = ("engine", "mode", "draft", "dtype", "tokens_per_second")
    shown = [row for row in same if any(row is one for one in best.values())]
    return speed_table([{key: row.get(key) for key in columns} for row in shown])


def training_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for everyone that trained (fields of `bench --train`); ratios are to the first row."""
    columns: Columns = {
        "engine": ("engine", str),
        "mode": ("trains", str),
        "tokens_per_second": ("tokens/s", fixed(0)),
        "seconds_per_step": ("s/step", lambda value: f"{value:.3g}"),
        "step_ratio": ("x full", fixed(2)),
        "mfu": ("MFU", percent),
        "peak_bytes": ("peak", size),
        "peak_ratio": ("x full", fixed(2)),
        "training_bytes": ("of it training", size),
        "training_ratio": ("x full", fixed(2)),
    }
    return Table.of(rows, columns, labels=("engine", "mode"))


def alone_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for each thing measured of a family and of its members trained by themselves.

    Args:
        rows: fields `what`, `alone`, `distilled` and `family`; without a number where nothing was measured.
    """
    columns: Columns = {
        "what": ("", str),
        "alone": ("trained alone", fixed(3)),
        "distilled": ("distilled alone", fixed(3)),
        "family": ("one family", fixed(3)),
    }
    return Table.of(rows, columns, labels=("what",))


def setting(row: Mapping[str, Any]) -> str:
    """Return what tells rows of one engine, mode and draft apart: the cache, or how much is drafted.

    >>> setting({"cache": "static"}), setting({"schedule": "default"}), setting({"gamma": 4})
    ('static cache', 'default schedule', '4 a round')
    >>> setting({"gamma": "auto"})
    'gamma auto'
    """
    if row.get("cache"):
        return f"{row['cache']} cache"
    if row.get("gamma") == "auto":
        return "gamma auto"
    if row.get("gamma"):
        return f"{row['gamma']} a round"
    return f"{row['schedule']} schedule" if row.get("schedule") else ""


def way(row: Mapping[str, Any]) -> str:
    """Describe a row of a bench.

    >>> way({"engine": "nestling", "mode": "speculative", "draft": "D", "gamma": 4})
    'nestling speculative by D, 4 a round'
    """
    draft = f" by {row['draft']}" if row.get("draft") else ""
    return ", ".join(filter(None, [f"{row['engine']} {row['mode']}{draft}", setting(row)]))


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys and text.

    >>> flatten({"trainer": {"max_steps": 100}, "seed": 1, "card": {"gpu": None}})
    {'trainer.max_steps': '100', 'seed': '1', 'card.gpu': '-'}
    """
    items = (
        flatten(item, f"{prefix}{key}.").items()
        if isinstance(item, Mapping)
        else [(f"{prefix}{key}", NOTHING if item is None else str(item))]
        for key, item in value.items()
    )
    return dict(chain.from_iterable(items))


def _speed_up(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    same = ("run", "engine", "dtype", "temperature")
    plain = [
        other["tokens_per_second"]
        for other in rows
        if other.get("mode") == "plain" and all(other.get(key) == row.get(key) for key in same)
    ]
    speed = row.get("tokens_per_second")
    return speed / max(plain) if plain and max(plain) and speed is not None else None
