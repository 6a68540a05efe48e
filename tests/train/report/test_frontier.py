"""The sizes that a search found, on the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.report.frontier import frontier_rows, keep_frontier
from train.report.read import read_runs
from train.report.sections import sections

MakeRun = Callable[..., Path]


def row(
    name: str | None, granularity: str, origin: str, costs: dict[str, float], loss: float
) -> dict[str, Any]:
    known = {"name": name, "granularity": granularity, "from": origin, "costs": costs}
    return {**known, "loss": loss, "error": 0.01}


FOUND = {
    "model": "checkpoints/it's/model",
    "budgets": ["params=0.5"],
    "members": [
        row("XL", "full", "trained", {"params": 100.0}, 2.0),
        row(None, "ffn=1:0.5", "found", {"params": 70.0}, 2.1),
        row(None, "ffn=0.5", "uniform", {"bytes": 1.0}, 2.2),
    ],
}


def test_the_page_names_each_member_and_what_extracts_it(make_run: MakeRun) -> None:
    run = make_run()
    assert "Every size" not in sections(read_runs([run]))
    (run / "model").mkdir(exist_ok=True)
    assert keep_frontier(run / "model", FOUND) == run / "frontier.json"
    page = sections(read_runs([run]))
    assert "Every size" in page
    assert "--granularity ffn=1:0.5 --out member" in page


def test_rows_are_what_was_measured_in_the_budgets_kind() -> None:
    rows = frontier_rows(FOUND)
    assert [row["member"] for row in rows] == ["ffn=1:0.5", "XL"]
    assert abs(rows[0]["high"] - rows[0]["low"] - 0.04) < 1e-12
    assert frontier_rows({}) == []


def test_a_model_without_a_run_keeps_nothing(tmp_path: Path) -> None:
    assert keep_frontier(tmp_path / "model", json.loads(json.dumps(FOUND))) is None
    assert list(tmp_path.iterdir()) == []
