"""Tables and numbers as people read them, the same on the page and in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from models.checkpoint.family import Member

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Text cells; the first `num_labels` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_labels: int = 1


def family_table(members: Sequence[Member]) -> Table:
    """One row a member, the largest first; a column that nobody measured is left out."""
    ordered = sorted(members, key=lambda member: -member.parameters)
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "name": ("member", str),
        "granularity": ("granularity", str),
        "parameters": ("parameters", si),
        "loss": ("loss", fixed(3)),
        "perplexity": ("perplexity", fixed(2)),
        "match": ("match", percent),
        "kl": ("KL", fixed(3)),
        "alpha": ("alpha", fixed(3)),
    }
    return _table([asdict(member) for member in ordered], columns, num_labels=2)


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a way of decoding; speed-up is against the same engine's fastest plain decoding.

    Args:
        rows: fields `run`, `engine`, `mode`, `draft`, `cache`, `schedule`, `gamma`, `dtype`, `temperature`,
            `tokens_per_second`, `seconds_to_first_token`, `tau`, `alpha` and `mbu`, all but one of them
            optional.
    """
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "run": ("run", str),
        "engine": ("engine", str),
        "mode": ("mode", str),
        "draft": ("draft", str),
        "setting": ("setting", str),
        "dtype": ("dtype", str),
        "temperature": ("temperature", str),
        "tokens_per_second": ("tokens/s", fixed(1)),
        "speed_up": ("speed-up", lambda value: f"{value:.2f}×"),
        "seconds_to_first_token": ("first token", lambda value: f"{1e3 * value:.1f} ms"),
        "tau": ("tau", fixed(2)),
        "alpha": ("alpha", fixed(3)),
        "mbu": ("bandwidth", lambda value: f"{value:.0%}"),
    }
    filled = [{**row, "setting": setting(row) or None, "speed_up": _speed_up(row, rows)} for row in rows]
    names = ("run", "engine", "mode", "draft", "setting", "dtype")
    labels = [key for key in names if any(row.get(key) is not None for row in filled)]
    return _table(filled, columns, num_labels=len(labels))


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
    """One row for everyone that trained (fields of `bench --train`); ratios are to the first row."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "engine": ("engine", str),
        "mode": ("trains", str),
        "tokens_per_second": ("tokens/s", lambda value: f"{value:,.0f}"),
        "seconds_per_step": ("s/step", lambda value: f"{value:.3g}"),
        "step_ratio": ("x full", fixed(2)),
        "mfu": ("MFU", lambda value: f"{value:.0%}"),
        "peak_bytes": ("peak", _mebibytes),
        "peak_ratio": ("x full", fixed(2)),
        "training_bytes": ("of it training", _mebibytes),
        "training_ratio": ("x full", fixed(2)),
    }
    return _table(rows, columns, num_labels=2)


def setting(row: Mapping[str, Any]) -> str:
    """What tells rows of one engine, mode and draft apart: the cache, or how much is drafted.

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
    """A row of a bench in words.

    >>> way({"engine": "nestling", "mode": "speculative", "draft": "D", "gamma": 4})
    'nestling speculative by D, 4 a round'
    """
    draft = f" by {row['draft']}" if row.get("draft") else ""
    return ", ".join(filter(None, [f"{row['engine']} {row['mode']}{draft}", setting(row)]))


def si(value: float) -> str:
    """A count with three digits and a unit prefix.

    >>> si(3_704_512), si(998), si(81_920), si(1_235_814_400)
    ('3.70M', '998', '81.9k', '1.24G')
    """
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{value:.0f}"


def fixed(digits: int) -> Callable[[float], str]:
    """A format with so many digits after the point."""
    return lambda value: f"{value:.{digits}f}"


def percent(value: float) -> str:
    """A value that is in percent already, as `match` is."""
    return f"{value:.1f} %"


def duration(seconds: float) -> str:
    """Time as people say it.

    >>> duration(7.26), duration(75), duration(3600 * 2 + 60 * 5)
    ('7.3 s', '1 min 15 s', '2 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys and text.

    >>> flatten({"trainer": {"max_steps": 100}, "seed": 1, "card": {"gpu": None}})
    {'trainer.max_steps': '100', 'seed': '1', 'card.gpu': '–'}
    """
    items = (
        flatten(item, f"{prefix}{key}.").items()
        if isinstance(item, Mapping)
        else [(f"{prefix}{key}", NOTHING if item is None else str(item))]
        for key, item in value.items()
    )
    return dict(chain.from_iterable(items))


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, Callable[[Any], str]]],
    *,
    num_labels: int,
) -> Table:
    used = [key for key in columns if any(row.get(key) is not None for row in rows)]
    return Table(
        tuple(columns[key][0] for key in used),
        tuple(
            tuple(NOTHING if row.get(key) is None else columns[key][1](row[key]) for key in used)
            for row in rows
        ),
        num_labels,
    )


def _speed_up(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    same = ("run", "engine", "dtype", "temperature")
    plain = [
        other["tokens_per_second"]
        for other in rows
        if other.get("mode") == "plain" and all(other.get(key) == row.get(key) for key in same)
    ]
    speed = row.get("tokens_per_second")
    return speed / max(plain) if plain and max(plain) and speed is not None else None
