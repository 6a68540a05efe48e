import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from models.errors import UsageError
from train.metrics import MetricsLog, read_metrics
from train.recipe import TrackingConfig
from train.tracking import make_loggers


class Mirror(Logger):
    """Remembers what it is told; fails when told to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.told: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "mirror"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.told.append((step, metrics))


def test_a_line_goes_to_the_file_and_its_numbers_to_every_mirror(tmp_path: Path) -> None:
    mirror = Mirror()
    log = MetricsLog(tmp_path / "metrics.jsonl", [mirror])
    log.write("train", 3, {"loss/XL": 1.5})
    log.write("sample", 3, {"member": "S", "text": "once"})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 3, "loss/XL": 1.5},
        {"kind": "sample", "step": 3, "member": "S", "text": "once"},
    ]
    assert mirror.told == [(3, {"loss/XL": 1.5})]


def test_a_mirror_that_fails_is_dropped_with_a_warning_and_harms_nobody(tmp_path: Path) -> None:
    good = Mirror()
    log = MetricsLog(tmp_path / "metrics.jsonl", [Mirror(fails=True), good])
    with pytest.warns(UserWarning, match="Mirror failed and is dropped: no network"):
        log.write("train", 1, {"loss/XL": 2.0})
    log.write("train", 2, {"loss/XL": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [step for step, _ in good.told] == [1, 2]


def test_going_on_forgets_the_lines_of_the_history_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": step} for step in (2, 4, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    MetricsLog(path, first_step=4)
    assert read_metrics(path) == lines[:2]


def test_wandb_works_offline_and_keeps_its_run_id(tmp_path: Path) -> None:
    config = TrackingConfig(wandb="offline", tensorboard=False)
    ids = []
    for _ in range(2):
        (logger,) = make_loggers(config, tmp_path)
        ids.append(logger.version)
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()


@pytest.mark.parametrize("name", ["CSVLogger", "lightning.pytorch.loggers.CSVLogger"])
def test_any_logger_of_lightning_is_a_name_in_the_recipe(tmp_path: Path, name: str) -> None:
    loggers = make_loggers(TrackingConfig(wandb="disabled", tensorboard=False, logger=name), tmp_path)
    assert [type(logger) for logger in loggers] == [CSVLogger]


@pytest.mark.parametrize("name", ["NoSuchLogger", "no.such.module.Logger"])
def test_a_logger_that_does_not_exist_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config = TrackingConfig(wandb="disabled", tensorboard=False, logger=name)
    with pytest.raises(UsageError, match=rf"tracking\.logger={name}: cannot be made"):
        make_loggers(config, tmp_path)
