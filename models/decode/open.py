"""A model folder opened to run here: in the given or the fastest dtype, with the threads for it."""

import dataclasses
import logging
from pathlib import Path

import torch

from models.base.dtypes import DTYPES
from models.base.errors import UsageError
from models.checkpoint.folder import ModelFolder, load_model
from models.decode.tune.predict import best_num_threads, best_num_threads_of_layers
from models.elastic.view import cut_layers
from models.machine.card import machine_card, num_threads, resolve_dtype
from models.packed.quantize import FILE, INT8, PackedLM, is_in_blocks, pack

AUTO = "auto"
UNQUANTIZED = ("F32", "F16", "BF16")

_log = logging.getLogger(__name__)


def open_for_decoding(path: str | Path, dtype: str = "auto") -> tuple[ModelFolder, str]:
    """Open a model folder, packed in the dtype, and set torch to the threads that it decodes fastest with.

    Args:
        path: the folder.
        dtype: as `open_in_dtype` takes it, but that `auto` runs a quantized GGUF file as it is stored.

    Returns:
        The folder, and the name of the dtype.

    Raises:
        UsageError: if there is no folder at `path` or no such dtype.
        NestlingError: if the folder is damaged.
    """
    folder, name = open_in_dtype(path, dtype, auto_in_blocks=True)
    if name not in (INT8, FILE):  # which are packed already
        folder = dataclasses.replace(folder, model=pack(folder.model, name))
    most = num_threads(machine_card(), name, purpose="decoding")
    torch.set_num_threads(best_num_threads(folder.model, most))
    return folder, name


def open_in_dtype(path: str | Path, dtype: str, *, auto_in_blocks: bool = False) -> tuple[ModelFolder, str]:
    """Open a model folder in a dtype, on the GPU if there is one.

    Models in int8 and in the blocks of a file run packed, on the CPU: their rows are scaled one by one, and
    each is a target of its own.

    Args:
        path: the folder.
        dtype: `fp32`, `bf16`, `fp16`, `int8`; `file`, as the weights are stored; or `auto`: the faster of
            fp32 and bf16 by the machine's card.
        auto_in_blocks: whether `auto` keeps a quantized GGUF file as it is stored.

    Returns:
        The folder, and the name of the dtype; `file` is one of weights in blocks.

    Raises:
        UsageError: if there is no folder at `path`, no such dtype, or no kernels for what is stored.
        NestlingError: if the folder is damaged.
    """
    folder, name = _open(path, dtype, auto_in_blocks)
    packs = name in (INT8, FILE)
    return (dataclasses.replace(folder, model=pack(folder.model, name)) if packs else folder), name


def open_layers(path: str | Path, first: int, last: int, dtype: str = "auto") -> tuple[ModelFolder, str, int]:
    """Open some layers of a model folder, which alone are packed; see `open_for_decoding`.

    Args:
        path: the folder.
        first: the first layer.
        last: the last one.
        dtype: as `open_for_decoding` takes it.

    Returns:
        The folder, whose model has just those layers; the name of the dtype; how many layers there are.

    Raises:
        UsageError: if there is no folder at `path`, no such dtype, or no such layer.
        NestlingError: if the folder is damaged.
    """
    folder, name = _open(path, dtype, True)
    num_layers = folder.model.config.num_hidden_layers
    if not first <= last < num_layers:
        raise UsageError(
            f"--layers {first}-{last}: {path} has the layers 0-{num_layers - 1}; choose of those"
        )
    model = PackedLM(cut_layers(folder.model, first, last), name)
    most = num_threads(machine_card(), name, purpose="decoding")
    torch.set_num_threads(best_num_threads_of_layers(model, most))
    return dataclasses.replace(folder, model=model), name, num_layers


def _open(path: str | Path, dtype: str, auto_in_blocks: bool) -> tuple[ModelFolder, str]:
    card = machine_card()
    stored = None if dtype in (FILE, INT8) else resolve_dtype(dtype, card, purpose="decoding")
    folder = load_model(
        path,
        dtype=None if stored is None else DTYPES[stored],
        mapped=card.gpu is None,
        in_blocks=card.gpu is None and (dtype == FILE or (dtype == AUTO and auto_in_blocks)),
    )
    if is_in_blocks(folder.model):
        return folder, FILE
    if dtype == FILE or auto_in_blocks:
        _check_quantizations(folder, dtype)
    if dtype == INT8:
        if folder.model.dtype == torch.float16:  # compiled code reads no such embedding
            folder.model.float()
        return folder, INT8
    folder.model.to("cuda" if card.gpu else "cpu")
    return folder, stored or next(name for name, one in DTYPES.items() if one == folder.model.dtype)


def _check_quantizations(folder: ModelFolder, dtype: str) -> None:
    """Tell that a GGUF file's weights are rounded again, or refuse to where its own bits were asked for."""
    if not folder.path.is_file():  # a folder that was imported from one
        return
    quantized = [name for name in folder.provenance.get("quantizations", ()) if name not in UNQUANTIZED]
    if not quantized:
        return
    kinds = ", ".join(quantized)
    if dtype == FILE:
        raise UsageError(
            f"--dtype file: {folder.path} holds {kinds}, which do not run as they are here; choose auto"
        )
    if dtype == AUTO:
        _log.warning(
            "%s holds %s, which do not run as they are here: they are dequantized", folder.path, kinds
        )
