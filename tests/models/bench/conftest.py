"""Samples whose figures can be worked out by hand."""

from collections.abc import Callable

import pytest

from models.bench.engines import Sample


@pytest.fixture(autouse=True)
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same engines whether the extra `llama` is installed or not; a test that needs it undoes this."""
    monkeypatch.setattr("models.bench.llama.is_installed", lambda: False)


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    """Four tokens, the first after one second, the others after two more in two passes."""

    def make(**fields: object) -> Sample:
        known = {"ids": [1, 2, 3, 4], "first_tokens": 1, "first_seconds": 1.0, "seconds": 3.0, "passes": 2}
        return Sample(**(known | fields))  # type: ignore[arg-type]

    return make
