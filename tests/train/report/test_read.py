"""What the report believes of a run folder, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.base.errors import NestlingError, UsageError
from train.report.read import read_runs
from train.run.metrics import read_metrics

MakeRun = Callable[..., Path]


def append(run: Path, *lines: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_step_that_a_resumed_run_repeats_counts_once_with_its_last_value(make_run: MakeRun) -> None:
    run = make_run()
    before = read_runs([run])[0]
    append(run, {"kind": "train", "step": 200, "tokens": 1, "loss/XL": 9.0})
    after = read_runs([run])[0]
    assert len(after.train) == len(before.train)
    assert [line["loss/XL"] for line in after.train if line["step"] == 200] == [9.0]


def test_lines_come_by_step_whatever_their_order_in_the_file(make_run: MakeRun) -> None:
    run = make_run()
    append(run, {"kind": "valid", "step": 7, "tokens": 1})
    steps = [line["step"] for line in read_runs([run])[0].valid]
    assert steps[0] == 7
    assert steps == sorted(steps)


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', "\x00\x00", "[1]", '{"kind": "train"}'])
def test_a_torn_line_is_skipped(make_run: MakeRun, torn: str) -> None:
    metrics = make_run() / "metrics.jsonl"
    whole = read_metrics(metrics)
    with metrics.open("a") as stream:
        stream.write(torn)
    assert read_metrics(metrics) == whole


def test_every_member_of_a_step_keeps_its_sample(make_run: MakeRun) -> None:
    run = read_runs([make_run()])[0]
    last = [line["member"] for line in run.samples if line["step"] == 400]
    assert sorted(last) == ["L", "S", "XL"]


def test_training_time_adds_up_over_resumes(make_run: MakeRun) -> None:
    run = make_run(steps=100)
    append(
        run, *({"kind": "train", "step": step, "tokens": step, "seconds": step - 100} for step in (110, 120))
    )
    assert read_runs([run])[0].seconds == pytest.approx(100 * 0.9 + 20)


def test_a_run_without_a_model_folder_still_knows_its_members_and_which_is_the_full_one(
    make_run: MakeRun,
) -> None:
    path = make_run()
    (path / "model" / "nestling.json").unlink()
    run = read_runs([path])[0]
    assert run.members == []
    assert set(run.member_names) == {"S", "M", "L", "draft", "XL"}
    assert run.full == "XL"


def test_the_same_folder_twice_is_one_run_and_equal_names_get_their_path(make_run: MakeRun) -> None:
    first, second = make_run("a/demo"), make_run("b/demo")
    assert [run.name for run in read_runs([first, second, first])] == [str(first), str(second)]


def test_a_path_that_is_no_folder_is_wrong_usage(make_run: MakeRun, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", make_run() / "metrics.jsonl"):
        with pytest.raises(UsageError, match=str(path)):
            read_runs([path])
    with pytest.raises(UsageError, match="no run folder"):
        read_runs([])


def test_a_foreign_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NestlingError, match="is not a run folder") as caught:
        read_runs([tmp_path])
    assert caught.value.exit_code == 1


def test_a_run_that_has_measured_nothing_yet_is_named(make_run: MakeRun) -> None:
    run = make_run()
    (run / "metrics.jsonl").write_text('{"kind": "train", "st')
    with pytest.raises(NestlingError, match="no train or valid line yet"):
        read_runs([run])


@pytest.mark.parametrize("file", ["model/nestling.json", "model/config.json", "decode.json"])
def test_a_damaged_file_of_the_run_is_named(make_run: MakeRun, file: str) -> None:
    run = make_run()
    (run / file).write_text("{")
    with pytest.raises(NestlingError, match=f"{file} is not JSON"):
        read_runs([run])
