"""Which charts are shown, and which values reach them."""

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from train.report.figures import (
    MAX_POINTS,
    Figure,
    consistency_figures,
    family_figures,
    gradient_figures,
    loss_figures,
    machine_figures,
    make_key,
)
from train.report.read import Run, read_runs

MakeRun = Callable[..., Path]


def rows_of(figure: Figure) -> list[dict[str, Any]]:
    spec = figure.chart.to_dict()
    inside = spec.get("datasets", {}).values()
    own = [part["data"]["values"] for part in [spec, *spec["layer"]] if "values" in part.get("data", {})]
    return list(chain(*inside, *own))


def titles(figures: list[Figure]) -> list[str]:
    return [figure.title for figure in figures]


@pytest.fixture
def one(make_run: MakeRun) -> list[Run]:
    return read_runs([make_run()])


@pytest.fixture
def two(make_run: MakeRun) -> list[Run]:
    return read_runs([make_run("a"), make_run("b", shift=0.1)])


def test_one_run_has_a_line_for_each_member(one: list[Run]) -> None:
    validation, objective = loss_figures(one, make_key(one))
    assert {row["member"] for row in rows_of(validation)} == {"S", "M", "L", "draft", "XL"}
    assert {row["member"] for row in rows_of(objective)} == {"S", "M", "L", "draft", "XL"}


def test_several_runs_have_a_panel_for_each_member_with_a_line_for_each_run(two: list[Run]) -> None:
    figures = loss_figures(two, make_key(two))
    assert set(titles(figures)) == {
        *(f"Validation loss: {name}" for name in ("S", "M", "L", "draft", "XL")),
        "Training objective of the full model",
    }
    for figure in figures:
        assert {row["run"] for row in rows_of(figure)} == {"a", "b"}


def test_closeness_leaves_the_full_model_out(one: list[Run]) -> None:
    for figure in consistency_figures(one, make_key(one)):
        assert {row["member"] for row in rows_of(figure)} == {"S", "M", "L", "draft"}


def test_members_pulls_at_the_weights_and_promised_speeds_have_a_figure_each(one: list[Run]) -> None:
    norm, cosine = gradient_figures(one, make_key(one))
    assert {row["member"] for row in rows_of(norm)} == {"S", "M", "L", "draft", "XL"}
    assert {row["member"] for row in rows_of(cosine)} == {"S", "M", "L", "draft"}
    assert [row["value"] for row in rows_of(cosine) if row["member"] == "S"] == [
        line["gradient/S/cosine"] for line in one[0].gradients
    ]
    speed = consistency_figures(one, make_key(one))[2]
    assert speed.title == "Predicted speed-up"
    assert {row["member"] for row in rows_of(speed)} == {"S", "M", "L", "draft"}


def test_a_run_from_before_these_were_measured_has_the_other_figures(make_run: MakeRun) -> None:
    path = make_run()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    old = [
        {key: value for key, value in line.items() if key != "mfu" and "speedup" not in key}
        for line in lines
        if line["kind"] != "gradient"
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    runs = read_runs([path])
    key = make_key(runs)
    assert gradient_figures(runs, key) == []
    assert titles(consistency_figures(runs, key)) == ["Alpha", "Greedy match"]
    assert "Utilisation" not in titles(machine_figures(runs, key))


def test_what_was_not_measured_has_no_figure() -> None:
    bare = Run(
        name="bare",
        train=[{"step": 1, "tokens": 1, "loss/XL": 2.0}],
        valid=[],
        samples=[],
        members=[],
        decode={},
        recipe="",
        provenance={},
    )
    key = make_key([bare])
    for drawn in (family_figures, consistency_figures, gradient_figures, machine_figures):
        assert drawn([bare], key) == []
    assert titles(loss_figures([bare], key)) == ["Training objective"]


@pytest.mark.parametrize("odd", [math.nan, math.inf, None, "nan"])
def test_a_value_that_is_no_number_is_left_out(one: list[Run], odd: object) -> None:
    one[0].valid[3]["valid/S/loss"] = odd
    step = one[0].valid[3]["step"]
    rows = rows_of(loss_figures(one, make_key(one))[0])
    assert {row["member"] for row in rows if row["step"] == step} == {"M", "L", "draft", "XL"}


def test_a_long_run_is_averaged_to_few_points_that_keep_the_mean(make_run: MakeRun) -> None:
    runs = read_runs([make_run(steps=5000)])
    speeds = [line["tokens_per_second"] for line in runs[0].train]
    rows = rows_of(machine_figures(runs, make_key(runs))[0])
    assert len(speeds) > MAX_POINTS >= len(rows) > MAX_POINTS / 2
    assert rows[-1]["tokens"] == runs[0].train[-1]["tokens"]
    assert sum(row["value"] for row in rows) / len(rows) == pytest.approx(sum(speeds) / len(speeds), rel=1e-3)


def test_the_fall_of_the_first_steps_does_not_flatten_the_rest(one: list[Run]) -> None:
    objective = loss_figures(one, make_key(one))[1]
    top = objective.chart.to_dict()["layer"][0]["encoding"]["y"]["scale"]["domain"][1]
    first = max(line["loss/XL"] for line in one[0].train)
    assert top < 0.9 * first


def test_names_of_several_runs_stand_once_each(two: list[Run]) -> None:
    for figure in family_figures(two, make_key(two)):
        labels = [row["label"] for row in rows_of(figure) if row.get("label")]
        assert sorted(labels) == ["L", "M", "S", "XL", "draft"]
