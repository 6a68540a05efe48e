"""The machine card: what this machine does well, measured once and kept.

`dtype: auto`, the number of threads and figures of utilisation read it, so that nothing about speed
is assumed from a type of hardware: a CPU without native bf16 never gets bf16, where it would be
several times slower than fp32. The card is a JSON file in the user's cache folder, one per kind of
processor, number of cores, torch version and GPU.

On a busy machine everything is timed with one thread and by the processor time that it got: threads
wait for each other there, and a short run may be held up by luck. The rates are then lower than they
could be, but their ratios, and so the choice of a dtype, hold.
"""

import dataclasses
import datetime
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from models.base.dtypes import DTYPES
from models.base.errors import NestlingError, UsageError
from models.base.files import default_cache_dir, read_json, write_json
from models.base.numbers import NOTHING, size
from models.base.processor import Load, busy_now, memory_bytes, processor_name, usable_cores
from models.base.stopwatch import Clock
from models.base.table import Table
from models.kernels.build import kernels_name, library
from models.machine.probe import DeviceRates, DtypeRates, measure_device
from models.machine.threads import thread_counts

Purpose: TypeAlias = Literal["training", "decoding"]

# Autocast casts at every step, so the product must be clearly faster to pay for it.
TRAINING_MARGIN = 1.5
DECODING_MARGIN = 1.1
# Counted up when a card's content changes, so that older cards are measured again.
FORMAT = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The identity of a kind of machine, as far as speed goes."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    """Cores that this process may use."""
    torch_version: str
    compiled: bool
    """True if decoding runs on the compiled step: other kernels, other costs."""
    gpu: str | None

    @property
    def key(self) -> str:
        """Return a short name, for the cache file."""
        text = json.dumps([FORMAT, dataclasses.asdict(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class MachineCard:
    """The measurements of one machine."""

    key: str
    cores: int
    torch_version: str
    measured: str
    """Date and time in UTC, in ISO's format."""
    busy: bool
    """True if other programs were at work: the rates are one thread's and lower than they could be."""
    cpu: DeviceRates
    gpu: DeviceRates | None

    @property
    def device(self) -> DeviceRates:
        """Return the device that work goes to: the GPU if there is one."""
        return self.gpu or self.cpu

    def to_json(self) -> dict[str, Any]:
        """Return the card as what JSON can hold; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "MachineCard":
        """Read what `to_json` gave.

        Raises:
            NestlingError: if it is not a whole card.
        """
        try:
            cpu = _device_from_json(fields["cpu"])
            gpu = _device_from_json(fields["gpu"]) if fields["gpu"] else None
            return MachineCard(**(fields | {"cpu": cpu, "gpu": gpu}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise NestlingError(f"machine card: it is damaged ({error!r}); measure again") from None


def machine_card(
    refresh: bool = False,
    *,
    cache_dir: Path | None = None,
    measure: Callable[[Machine], MachineCard] | None = None,
) -> MachineCard:
    """Return this machine's card, from the cache or measured now, in two or three seconds.

    A damaged card is measured again, and one from a busy machine as soon as the machine is quiet.

    Args:
        refresh: measure in any case.
        cache_dir: folder of cards; `default_cache_dir()` if None.
        measure: function that measures; `measure_card` if None.
    """
    machine = this_machine()
    path = _path(machine, cache_dir)
    cached = None if refresh else _read(path)
    if cached and not (cached.busy and not busy_now()):
        return cached
    card = (measure or measure_card)(machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, card.to_json())
    except OSError as error:  # a cache that cannot be written costs seconds, not the run
        _log.warning("the machine card cannot be kept in %s: %s", path.parent, error)
    return card


def known_card(*, cache_dir: Path | None = None) -> MachineCard | None:
    """Return this machine's card if it was measured before; nothing is measured now."""
    return _read(_path(this_machine(), cache_dir))


def training_dtype(card: MachineCard) -> str:
    """Return the dtype to train in: "bf16" only where its measured product is clearly faster than fp32's."""
    rates = card.device.dtypes
    pays = rates["bf16"].product_gflops > TRAINING_MARGIN * rates["fp32"].product_gflops
    return "bf16" if pays else "fp32"


def decoding_dtype(card: MachineCard) -> str:
    """Return the dtype to decode in: "bf16" only where passes over the weights on 1 to 16 tokens are faster.

    fp16 is never chosen, however fast: its range is smaller than that of weights trained in the others.
    """
    fp32, bf16 = card.device.dtypes["fp32"], card.device.dtypes["bf16"]
    pays = bf16.pass_seconds and _typical_pass(bf16) * DECODING_MARGIN < _typical_pass(fp32)
    return "bf16" if pays else "fp32"


def resolve_dtype(name: str, card: MachineCard, *, purpose: Purpose) -> str:
    """Turn a setting, `auto` included, into the name of a dtype, a key of `DTYPES`.

    Raises:
        UsageError: for a name that is not one.
    """
    if name == "auto":
        return training_dtype(card) if purpose == "training" else decoding_dtype(card)
    if name not in DTYPES:
        known = [*DTYPES, "int8", "file"] if purpose == "decoding" else DTYPES  # these are no dtypes
        raise UsageError(f"dtype={name} is not known; choose from auto, {', '.join(known)}")
    return name


def num_threads(card: MachineCard, dtype: str, *, purpose: Purpose) -> int:
    """Return the number of CPU threads that measured best for this work; all cores where nothing could tell.

    What is no dtype of weights, as int8, was not measured: it takes fp32's number.
    """
    rates = card.cpu.dtypes.get(dtype, card.cpu.dtypes["fp32"])
    best = rates.product_threads if purpose == "training" else rates.decode_threads
    return min(card.cores if card.busy else best, usable_cores())


def facts(card: MachineCard) -> list[tuple[str, str]]:
    """Return the card in words: rows of name and value."""
    gpu = f"{card.gpu.name}, {size(card.gpu.memory_bytes)}" if card.gpu else "none"
    rows = [
        ("processor", f"{card.cpu.name}, {card.cores} cores, {size(card.cpu.memory_bytes)}"),
        ("GPU", gpu),
        ("torch", card.torch_version),
        ("memory read", f"{card.device.read_gbps:.1f} GB/s"),
        ("trains in", training_dtype(card)),
        ("decodes in", decoding_dtype(card)),
        ("decodes by", kernels_name()),
        ("measured", f"{card.measured}; a typical run took {card.device.noise:.0%} longer than the shortest"),
    ]
    if card.busy:
        note = "other programs were busy: rates are one thread's; measured again once it is quiet"
        rows.append(("note", note))
    return rows


def rates_table(card: MachineCard) -> Table:
    """Return the measurements as a table with a row for each device and dtype."""
    tokens = list(card.cpu.dtypes["fp32"].pass_seconds)
    slowdowns = [f"v({num})" for num in tokens[1:]]
    header = ("device", "dtype", "product", "threads", "weights pass", *slowdowns)
    rows = []
    for label, device in (("cpu", card.cpu), ("gpu", card.gpu)):
        for dtype, rates in device.dtypes.items() if device else ():
            product = f"{rates.product_gflops:.0f} GFLOP/s"
            threads = f"{rates.product_threads} / {rates.decode_threads}" if label == "cpu" else NOTHING
            passes = [NOTHING] * len(tokens)
            if rates.pass_seconds:
                passes = [f"{value:.2f}" for value in rates.slowdown().values()]
                passes[0] = f"{rates.pass_seconds[1] * 1e3:.3g} ms"
            rows.append((label, dtype, product, threads, *passes))
    return Table(header, tuple(rows), num_labels=2)


def this_machine() -> Machine:
    """Identify the machine that this runs on."""
    cpu, features = processor_name()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores, version = usable_cores(), str(torch.__version__)
    return Machine(
        cpu=cpu,
        features=features,
        cores=cores,
        torch_version=version,
        compiled=library() is not None,
        gpu=gpu,
    )


def measure_card(machine: Machine, *, num_matrices: int = 24, budget: float = 1.0) -> MachineCard:
    """Measure now, in two or three seconds; nothing is cached. For the settings see `measure_device`."""
    cpu, busy = _measure_cpu(machine, num_matrices, budget)
    gpu = None
    if machine.gpu is not None:
        memory = torch.cuda.get_device_properties().total_memory
        gpu = measure_device(torch.device("cuda"), name=machine.gpu, memory_bytes=memory, threads=[1])
    return MachineCard(
        key=machine.key,
        cores=machine.cores,
        torch_version=machine.torch_version,
        measured=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        busy=busy,
        cpu=cpu,
        gpu=gpu,
    )


def _measure_cpu(machine: Machine, num_matrices: int, budget: float) -> tuple[DeviceRates, bool]:
    """Return the processor's rates, and True if others were busy; what they disturbed is measured again."""

    def measure(threads: list[int], clock: Clock) -> DeviceRates:
        return measure_device(
            torch.device("cpu"),
            name=machine.cpu,
            memory_bytes=memory_bytes(),
            threads=threads,
            num_matrices=num_matrices,
            budget=budget,
            clock=clock,
        )

    if not busy_now():
        before = Load.now()
        rates = measure(thread_counts(machine.cores), time.perf_counter)
        if not before.is_busy(Load.now()):
            return rates, False
    return measure([1], time.thread_time), True


def _path(machine: Machine, cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / f"machine-{machine.key}.json"


def _typical_pass(rates: DtypeRates) -> float:
    """Return the geometric mean, so that plain decoding and verifying weigh alike whatever each takes."""
    return math.exp(math.fsum(map(math.log, rates.pass_seconds.values())) / len(rates.pass_seconds))


def _device_from_json(fields: dict[str, Any]) -> DeviceRates:
    dtypes = {}
    for name in DTYPES:
        rates = fields["dtypes"][name]
        passes = {int(num): float(value) for num, value in rates["pass_seconds"].items()}
        dtypes[name] = DtypeRates(**(rates | {"pass_seconds": passes}))
    return DeviceRates(**(fields | {"dtypes": dtypes}))


def _read(path: Path) -> MachineCard | None:
    if not path.exists():
        return None
    try:
        return MachineCard.from_json(read_json(path))
    except NestlingError as error:
        _log.warning("%s: %s", path, error)
        return None
