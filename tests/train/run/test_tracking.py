import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger

from models.base.errors import UsageError
from train.recipe.sections import TrackingConfig
from train.run.metrics import MetricsLog, read_metrics
from train.run.tracking import Dashboard, make_loggers


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
    first, second = (make_loggers(config, tmp_path)[0] for _ in range(2))
    assert isinstance(first, Dashboard)
    assert isinstance(second, Dashboard)
    second.experiment.finish()
    assert first.experiment.id == second.experiment.id == (tmp_path / "wandb_id").read_text()


@pytest.mark.parametrize(("mode", "count"), [("disabled", 0), ("offline", 1)])
def test_the_variable_of_wandb_is_obeyed(
    mode: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)  # by which it would be online
    monkeypatch.setattr("train.run.tracking._wandb", lambda *_, offline: Mirror() if offline else None)
    assert len(make_loggers(TrackingConfig(), tmp_path)) == count


def test_wandb_keeps_tables_and_the_best_values_and_says_nothing(tmp_path: Path) -> None:
    """In a process of its own: whatever the suite tells wandb must not be why it is quiet."""
    script = f"""
import json
from pathlib import Path
from train.run.metrics import MetricsLog
from train.recipe.sections import TrackingConfig
from train.run.tracking import make_loggers
folder = Path({str(tmp_path)!r})
settings = {{"sampler": {{"share": 0.5}}}}
loggers = make_loggers(TrackingConfig(wandb="offline", tensorboard=False), folder, ["S"], settings)
log = MetricsLog(folder / "metrics.jsonl", loggers)
for step, loss in enumerate([3.0, 1.0, 2.0]):
    log.write("valid", step, {{"tokens": 64 * step, "valid/S/loss": loss, "valid/S/alpha": loss / 4}})
log.mirror_table("samples", 2, ["step", "member", "prompt", "text"], [[2, "S", "a", "cat"]])
log.close()
summary = loggers[0].experiment.summary
kept = {{key: summary[key] for key in ("S/valid_loss", "S/valid_alpha", "tokens")}}
kept["config"] = dict(loggers[0].experiment.config)
(folder / "summary.json").write_text(json.dumps(kept, default=dict))
"""
    quiet = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**quiet, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.stdout == done.stderr == ""
    (table,) = tmp_path.rglob("samples_*.table.json")
    columns = ["step", "member", "prompt", "text"]
    assert json.loads(table.read_text()) == {"columns": columns, "data": [[2, "S", "a", "cat"]]}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["S/valid_loss"] == {"min": 1.0}
    assert summary["S/valid_alpha"] == {"max": 0.75}
    assert summary["tokens"] == 128
    assert summary["config"] == {"sampler": {"share": 0.5}}


def test_wandb_that_cannot_start_is_dropped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**settings: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("wandb.init", fail)
    with pytest.warns(UserWarning, match="wandb failed and is dropped: no network"):
        assert make_loggers(TrackingConfig(wandb="online", tensorboard=False), tmp_path) == []


class FakeRun:
    """What the dashboard asks of a run of wandb, written down."""

    def __init__(self) -> None:
        self.defined: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, name: str, **settings: Any) -> None:
        self.defined[name] = settings

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


def test_the_dashboard_has_a_section_for_each_member_over_tokens(tmp_path: Path) -> None:
    fake = FakeRun()
    log = MetricsLog(tmp_path / "metrics.jsonl", [Dashboard(fake, ["S", "XL"])])
    log.write(
        "valid", 4, {"tokens": 64, "valid/S/alpha": 0.5, "loss/XL": 2.0, "lr": 0.1, "text": "no number"}
    )
    log.mirror_table("samples", 4, ["member", "text"], [["S", "cat"], ["XL", "dog"]])
    numbers, samples = fake.logged
    assert numbers == {"step": 4, "tokens": 64, "S/valid_alpha": 0.5, "XL/loss": 2.0, "lr": 0.1}
    assert samples["samples"].data == [["S", "cat"], ["XL", "dog"]]
    assert fake.defined["*"] == {"step_metric": "tokens"}
    summaries = {name: kept["summary"] for name, kept in fake.defined.items() if "summary" in kept}
    lowest, highest = ("loss", "valid_loss", "valid_kl"), ("valid_match", "valid_alpha", "valid_speedup")
    assert summaries == {
        **{f"{member}/{name}": "min" for member in ("S", "XL") for name in lowest},
        **{f"{member}/{name}": "max" for member in ("S", "XL") for name in highest},
    }
    assert all(fake.defined[name]["step_metric"] == "tokens" for name in summaries)


def test_a_table_goes_to_mirrors_that_show_tables_and_its_failure_harms_nobody(tmp_path: Path) -> None:
    plain, failing = Mirror(), Dashboard(FakeRun(), [])
    failing.experiment.log = None
    log = MetricsLog(tmp_path / "metrics.jsonl", [plain, failing])
    with pytest.warns(UserWarning, match="Dashboard failed and is dropped"):
        log.mirror_table("samples", 1, ["text"], [["cat"]])
    log.write("train", 2, {"loss/XL": 1.0})
    assert plain.told == [(2, {"loss/XL": 1.0})]


@pytest.mark.parametrize("name", ["CSVLogger", "lightning.pytorch.loggers.CSVLogger"])
def test_any_logger_of_lightning_is_a_name_in_the_recipe(tmp_path: Path, name: str) -> None:
    loggers = make_loggers(TrackingConfig(wandb="disabled", tensorboard=False, logger=name), tmp_path)
    assert [type(logger) for logger in loggers] == [CSVLogger]
    log = MetricsLog(tmp_path / "metrics.jsonl", loggers)
    log.write("train", 1, {"loss/XL": 2.0})
    log.write("gradient", 1, {"gradient/S/cosine": 0.5})
    log.mirror_table("samples", 1, ["text"], [["cat"]])
    log.close()
    assert "gradient/S/cosine" in next(tmp_path.rglob("metrics.csv")).read_text()


@pytest.mark.parametrize("name", ["NoSuchLogger", "no.such.module.Logger"])
def test_a_logger_that_does_not_exist_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config = TrackingConfig(wandb="disabled", tensorboard=False, logger=name)
    with pytest.raises(UsageError, match=rf"tracking\.logger={name}: cannot be made"):
        make_loggers(config, tmp_path)
