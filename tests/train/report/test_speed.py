"""The picture of a bench shows every row, and can be kept in each kind of file."""

from pathlib import Path
from typing import Any

import pytest

from train.report.speed import speed_chart
from train.report.style import save_chart


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    def row(engine: str, mode: str, temperature: float, speed: float, **more: Any) -> dict[str, Any]:
        return {
            "engine": engine,
            "mode": mode,
            "dtype": "fp32",
            "temperature": temperature,
            "tokens_per_second": speed,
            "tokens_per_second_range": [speed - 5, speed + 5],
            "speedup": speed / 100,
            **more,
        }

    return [
        row("nestling", "plain", 0.0, 100.0),
        row("nestling", "speculative", 0.0, 150.0, draft="D", gamma=4),
        row("transformers", "assisted", 0.0, 120.0, draft="D", schedule="default"),
        row("nestling", "plain", 1.0, 90.0),
    ]


def test_a_panel_for_each_distribution_with_bars_and_whiskers(rows: list[dict[str, Any]]) -> None:
    spec = speed_chart(rows, "a model").to_dict()
    panels = spec["vconcat"]
    assert [panel["title"]["text"] for panel in panels] == ["temperature 0, fp32", "temperature 1, fp32"]
    values = spec["datasets"][panels[0]["data"]["name"]]
    assert [value["way"] for value in values] == [
        "nestling plain",
        "nestling speculative by D, 4 a round",
        "transformers assisted by D, default schedule",
    ]
    assert [(value["least"], value["speed"], value["most"]) for value in values][1] == (145.0, 150.0, 155.0)
    # One scale for all panels, with room for what is written behind the longest whisker.
    ends = {panel["layer"][0]["encoding"]["x"]["scale"]["domain"][1] for panel in panels}
    assert len(ends) == 1
    assert ends.pop() > 155.0


@pytest.mark.parametrize(
    ("ending", "begin"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("html", b"<!DOCTYPE html>")]
)
def test_it_is_kept_in_the_kind_that_the_name_tells(
    rows: list[dict[str, Any]], tmp_path: Path, ending: str, begin: bytes
) -> None:
    path = tmp_path / f"speed.{ending}"
    save_chart(speed_chart(rows, "a model"), path)
    content = path.read_bytes()
    assert content.lstrip().startswith(begin)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    if ending == "html":
        assert b'src="http' not in content
