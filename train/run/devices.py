"""Are the devices that a recipe asks for here? Asked before anything is made, and in a dry run."""

import importlib.util

import torch

from models.base.errors import UsageError
from train.recipe.sections import TrainerConfig


def check_devices(settings: TrainerConfig) -> None:
    """Refuse an accelerator that is not here, and devices that it does not have.

    Raises:
        UsageError: naming the key, its value and what is here.
    """
    counts = _count_accelerators()
    kind = settings.accelerator
    if kind not in counts:
        here = ", ".join(counts)
        raise UsageError(f"trainer.accelerator={kind}: there is none here; give one of {here}")
    devices = str(settings.devices).strip().strip("[]")
    if devices == "auto":
        return
    count, key = counts[kind], f"trainer.devices={settings.devices}"
    try:
        numbers = [int(part) for part in devices.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if count is None:  # processes on the CPU, as many as one likes; other kinds are Lightning's to count
        if len(numbers) != 1 or "," in devices or numbers[0] < 1:
            raise UsageError(f"{key}: expected a whole number of at least 1, or auto")
        return
    if "," in devices:
        fits, asked = bool(numbers) and min(numbers) >= 0, max(numbers, default=0) + 1
    else:
        fits, asked = numbers == [-1] or (bool(numbers) and numbers[0] >= 1), sum(numbers)
    if not fits:
        raise UsageError(f"{key}: expected a whole number of at least 1, a list as in 0,1, or auto")
    if asked > count:
        raise UsageError(f"{key}: {count} of kind {kind} are here; give at most {count}, or auto")


def _count_accelerators() -> dict[str, int | None]:
    """Return the kinds that are here, each with its number of devices; None where it is not limited."""
    counts: dict[str, int | None] = {"cpu": None}
    if torch.cuda.is_available():
        counts |= dict.fromkeys(("cuda", "gpu"), torch.cuda.device_count())
    elif torch.backends.mps.is_available():
        counts |= {"mps": 1, "gpu": 1}
    if importlib.util.find_spec("torch_xla"):
        counts["tpu"] = None
    return {"auto": counts.get("gpu"), **counts}
