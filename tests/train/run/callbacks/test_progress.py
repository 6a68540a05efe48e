"""The lines of a training whose output is no terminal."""

import io
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from train.run.callbacks import progress
from train.run.callbacks.progress import ProgressBar


@pytest.mark.parametrize(("silent", "steps"), [(60.0, [5, 9]), (-1.0, list(range(5, 13)))])
def test_the_first_line_has_a_loss_and_others_follow_with_a_new_one_or_by_the_clock(
    silent: float, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", silent)
    stream, metrics = io.StringIO(), SimpleNamespace(latest={})
    bar: Any = ProgressBar(Console(file=stream, width=100), metrics, max_steps=30)  # type: ignore[arg-type]
    bar._first, bar._began, bar._printed, bar._tenth = 0, 0.0, perf_counter(), -1
    bar._losses, bar._shown = {}, {}
    for step in range(1, 13):
        if step == 5:
            metrics.latest = {"loss/XL": 2.0, "tokens_per_second": 100.0}
        if step == 9:  # a step in which the full model only teaches
            metrics.latest = {"loss/H": 3.0, "tokens_per_second": 100.0}
        bar.on_step(None, SimpleNamespace(step=step))
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == steps
    assert all("loss 2.000" in line and line.endswith(" left") for line in lines)
