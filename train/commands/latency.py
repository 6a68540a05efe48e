"""The time of a decoded token: of every member by a table, and of the one that was chosen as it is."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from models.base.errors import NestlingError
from models.base.files import naming, read_json
from models.base.processor import busy_now, processor_name
from models.base.stopwatch import Clock
from models.checkpoint.folder import ModelFolder
from models.elastic.granularity import Granularity
from models.machine.card import machine_card, resolve_dtype
from models.measure.latency import LatencyTable, measure_latency, shape_of, time_decoding
from models.packed.quantize import pack
from train.search.space import Space

SECONDS = 1.0
"""Budget for timing one member."""


@dataclass(frozen=True)
class Timing:
    """The clock that counts, and whether others keep the machine busy."""

    clock: Clock
    busy: bool


@contextlib.contextmanager
def timing() -> Iterator[Timing]:
    """Choose a clock; on a busy machine one thread and its own time, as threads wait for each other there."""
    busy, threads = busy_now(), torch.get_num_threads()
    torch.set_num_threads(1 if busy else threads)
    try:
        yield Timing(time.thread_time if busy else time.perf_counter, busy)
    finally:
        torch.set_num_threads(threads)


def latency_table(folder: ModelFolder, space: Space, path: Path | None) -> LatencyTable:
    """Return the table that a file holds, or measure this machine's.

    Raises:
        NestlingError: if the file holds none, or one of another model.
    """
    if path is not None:
        with naming(path):
            fields = read_json(path)
            table = LatencyTable.from_json(fields.get("latency") or fields)
            if table.shape != shape_of(folder.model.config):
                raise NestlingError(f"it is of a model of another shape, {table.shape}; measure again")
            return table
    dtype, num = resolve_dtype("auto", machine_card(), purpose="decoding"), space.num_layers
    half, low, middle = num // 2, space.ffn[0], space.ffn[len(space.ffn) // 2]
    checks = [
        Granularity(ffn=(low,) * half + (1.0,) * (num - half)),
        Granularity(ffn=(middle,) * half + (low,) * (num - half)),
        Granularity(ffn=(1.0,) + (middle,) * (num - half - 1), layers=tuple(range(num - half))),
    ]
    with timing() as how:
        return measure_latency(
            pack(folder.model, dtype),
            [(ffn, heads) for ffn in space.ffn for heads in space.heads],
            checks if half else [],
            machine=processor_name()[0] + (", busy" if how.busy else ""),
            dtype=dtype,
            clock=how.clock,
        )


def time_member(folder: ModelFolder, member: Granularity, dtype: str) -> float:
    """Return the seconds of a decoded token of a member in place."""
    with timing() as how:
        packed = pack(folder.model, dtype, member)
        return time_decoding(packed, [member], budget=SECONDS, clock=how.clock)[member]
