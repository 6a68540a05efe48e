"""Arguments of Python callers, checked by kind: a wrong one is named with its value and the remedy."""

import operator
import os
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from models.base.errors import UsageError


def whole_number(name: str, value: Any) -> int:
    """Return an int, which NumPy or torch may hold.

    >>> whole_number("seed", 3)
    3
    >>> whole_number("seed", "3")
    Traceback (most recent call last):
    models.base.errors.UsageError: seed='3' is not a whole number; give one, as in seed=1
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UsageError(f"{name}={show(value)} is not a whole number; give one, as in {name}=1")


def real_number(name: str, value: Any) -> float:
    """Return a float, which NumPy or torch may hold."""
    try:
        if isinstance(value, SupportsFloat) and not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise UsageError(f"{name}={show(value)} is not a number; give one, as in {name}=1.0")


def one_path(name: str, value: Any) -> Path:
    """Return the path that a text or a path object names."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"{name}={show(value)} is no path; give one as a text or a pathlib.Path")
    return Path(value)


def texts(name: str, values: Any) -> list[str]:
    """Return the texts of a list; one text alone is no list.

    >>> texts("names", "S")
    Traceback (most recent call last):
    models.base.errors.UsageError: names='S' is not a list of texts; give one, as in names=["..."]
    """
    found = [] if isinstance(values, str | Mapping) or not isinstance(values, Iterable) else list(values)
    if (not found and values not in ([], ())) or not all(isinstance(one, str) for one in found):
        raise UsageError(f'{name}={show(values)} is not a list of texts; give one, as in {name}=["..."]')
    return found


def show(value: object) -> str:
    """Return a value's short form, in one line."""
    return " ".join(reprlib.repr(value).split())
