"""Numbers as people read them, the same in every table: counts, bytes, durations, fractions."""

from collections.abc import Callable, Mapping

NOTHING = "-"
DECIMAL: Mapping[str, float] = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
BINARY: Mapping[str, float] = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10}


def si(value: float) -> str:
    """Format a count with three digits and a unit prefix.

    >>> si(3_704_512), si(998), si(81_920), si(1_235_814_400)
    ('3.70M', '998', '81.9k', '1.24G')
    """
    return _scaled(value, DECIMAL, "")


def size(num_bytes: float) -> str:
    """Format a number of bytes with three digits and a unit.

    >>> size(512), size(3_500_000), size(25 * 2**30)
    ('512 B', '3.34 MiB', '25.0 GiB')
    """
    return _scaled(num_bytes, BINARY, " B")


def duration(seconds: float) -> str:
    """Format a time in its two largest units.

    >>> duration(7.26), duration(75), duration(3600 * 2 + 60 * 5), duration(200_000)
    ('7.3 s', '1 min 15 s', '2 h 05 min', '2 d 07 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24:02d} h"


def fixed(digits: int, unit: str = "") -> Callable[[float], str]:
    """Return a format with this number of digits after the point.

    >>> fixed(2)(3.14159), fixed(1, " %")(87.25)
    ('3.14', '87.2 %')
    """
    return lambda value: f"{value:,.{digits}f}{unit}"


def percent(fraction: float) -> str:
    """Format a fraction in percent.

    >>> percent(0.256)
    '26%'
    """
    return f"{fraction:.0%}"


def optional(value: float | None, form: Callable[[float], str]) -> str:
    """Format a value that may be missing.

    >>> optional(None, si), optional(1500, si)
    ('-', '1.50k')
    """
    return NOTHING if value is None else form(value)


def _scaled(value: float, units: Mapping[str, float], without: str) -> str:
    for unit, factor in units.items():
        if abs(value) >= factor:
            scaled = value / factor
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{value:.0f}{without}"
