"""Samples whose figures can be worked out by hand."""

from collections.abc import Callable

import pytest

from models.bench.engines import Sample


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """Four tokens, the first after one second, the others after two more in two passes."""

    def make(**fields: object) -> Sample:
        known = {"ids": [1, 2, 3, 4], "first_tokens": 1, "first_seconds": 1.0, "seconds": 3.0, "passes": 2}
        return Sample(**(known | fields))  # type: ignore[arg-type]

    return make
