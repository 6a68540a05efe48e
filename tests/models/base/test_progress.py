"""Progress where there is no terminal."""

import io

import pytest
from rich.console import Console

from models.base import progress
from models.base.progress import progress_bar


def test_a_pipe_gets_a_line_now_and_then_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", -1.0)
    stream = io.StringIO()
    with progress_bar("measuring", 4, console=Console(file=stream)) as bar:
        bar.advance()
        bar.show("sorting", 4, 4)
    first, second = stream.getvalue().splitlines()
    assert first.startswith("measuring: 1/4, about ")
    assert second == "sorting: 4/4, about 0.0 s left"


def test_short_work_prints_nothing_into_a_pipe() -> None:
    stream = io.StringIO()
    with progress_bar("measuring", 4, console=Console(file=stream)) as bar:
        bar.advance(4)
    assert stream.getvalue() == ""
