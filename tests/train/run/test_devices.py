"""Devices that a recipe asks for and that are not here are named."""

import pytest
import torch

from models.base.errors import UsageError
from train.recipe.sections import TrainerConfig
from train.run.devices import check_devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("devices", ["auto", 1, 2, -1, "2", "-1", "0,1", "[0,1]", "1,"])
@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_devices_that_are_here_are_taken(devices: int | str, accelerator: str) -> None:
    check_devices(TrainerConfig(accelerator=accelerator, devices=devices))


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("devices", [0, 3, -2, "0,2", "many", "", "0,-1"])
def test_devices_that_are_not_here_are_named(devices: int | str) -> None:
    with pytest.raises(UsageError, match=f"trainer.devices={devices}: "):
        check_devices(TrainerConfig(accelerator="gpu", devices=devices))


def test_a_cpu_has_as_many_processes_as_one_likes() -> None:
    check_devices(TrainerConfig(accelerator="cpu", devices=64))
