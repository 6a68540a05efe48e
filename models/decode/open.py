"""A model folder opened to run here: in the given or the fastest dtype, with the threads for it."""

import dataclasses
from pathlib import Path

import torch

from models.base.dtypes import DTYPES
from models.checkpoint.folder import ModelFolder, load_model
from models.decode.tune.predict import best_num_threads
from models.machine.card import machine_card, num_threads, resolve_dtype
from models.packed.quantize import INT8, pack


def open_for_decoding(path: str | Path, dtype: str = "auto") -> tuple[ModelFolder, str]:
    """Open a model folder, packed in the dtype, and set torch to the threads that it decodes fastest with.

    Args:
        path: the folder.
        dtype: as `open_in_dtype` takes it.

    Returns:
        The folder, and the name of the dtype.

    Raises:
        UsageError: if there is no folder at `path` or no such dtype.
        NestlingError: if the folder is damaged.
    """
    folder, name = open_in_dtype(path, dtype)
    if name != INT8:  # which is packed already
        folder = dataclasses.replace(folder, model=pack(folder.model, name))
    most = num_threads(machine_card(), name, purpose="decoding")
    torch.set_num_threads(best_num_threads(folder.model, most))
    return folder, name


def open_in_dtype(path: str | Path, dtype: str) -> tuple[ModelFolder, str]:
    """Open a model folder in a dtype, on the GPU if there is one.

    An int8 model runs packed, on the CPU: its rows are scaled one by one, and it is a target of its own.

    Args:
        path: the folder.
        dtype: `fp32`, `bf16`, `fp16`, `int8`, or `auto`: the faster of fp32 and bf16 by the machine's card.

    Returns:
        The folder, and the name of the dtype.

    Raises:
        UsageError: if there is no folder at `path` or no such dtype.
        NestlingError: if the folder is damaged.
    """
    card = machine_card()
    stored = "fp32" if dtype == INT8 else resolve_dtype(dtype, card, purpose="decoding")
    folder = load_model(path, dtype=DTYPES[stored])
    if dtype == INT8:
        return dataclasses.replace(folder, model=pack(folder.model, INT8)), INT8
    folder.model.to("cuda" if card.gpu else "cpu")
    return folder, stored
