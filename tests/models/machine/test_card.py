import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from models.base.dtypes import DTYPES
from models.base.errors import NestlingError, UsageError
from models.base.processor import Load, processor_name
from models.base.stopwatch import Work, alternate
from models.machine.card import (
    Machine,
    MachineCard,
    decoding_dtype,
    facts,
    known_card,
    machine_card,
    measure_card,
    num_threads,
    rates_table,
    resolve_dtype,
    this_machine,
    training_dtype,
)
from models.machine.probe import DeviceRates, DtypeRates


def rates(gflops: float, milliseconds: float = 0, slowdowns: tuple[float, ...] = (1, 1, 1, 1)) -> DtypeRates:
    """Rates of one dtype from a line of a table: product, T(1), v(2), v(4), v(8), v(16)."""
    passes = dict(zip((1, 2, 4, 8, 16), (1, *slowdowns), strict=True)) if milliseconds else {}
    return DtypeRates(
        product_gflops=gflops,
        product_threads=2,
        decode_threads=1,
        pass_seconds={num: milliseconds * 1e-3 * slowdown for num, slowdown in passes.items()},
    )


def device(**dtypes: DtypeRates) -> DeviceRates:
    return DeviceRates(name="fake", memory_bytes=2**34, read_gbps=30.0, dtypes=dtypes, noise=0.01)


def card(cpu: DeviceRates, gpu: DeviceRates | None = None, *, busy: bool = False) -> MachineCard:
    return MachineCard(
        key="0", cores=4, torch_version="2", measured="2026-01-01", busy=busy, cpu=cpu, gpu=gpu
    )


# Two CPUs of two cores as they were measured, and some that could be.
ZEN_5 = device(
    fp32=rates(171, 13.3, (1.9, 1.5, 1.6, 1.8)), bf16=rates(822, 4.0, (1.02, 1.04, 1.15, 1.5)), fp16=rates(20)
)
XEON_WITHOUT_BF16 = device(
    fp32=rates(250, 8.8, (1.1, 1.9, 2.4, 2.4)), bf16=rates(56, 10.3, (1.6, 2.4, 3.5, 4.8)), fp16=rates(9)
)
HOPELESS_BF16 = device(fp32=rates(250, 8.8), bf16=rates(2), fp16=rates(2))
SLOW_PRODUCT_FAST_PASS = device(fp32=rates(200, 8), bf16=rates(220, 4), fp16=rates(9))
FAST_FP16 = device(fp32=rates(100, 8), bf16=rates(20), fp16=rates(900, 1))


@pytest.mark.parametrize(
    ("cpu", "training", "decoding"),
    [
        (ZEN_5, "bf16", "bf16"),
        (XEON_WITHOUT_BF16, "fp32", "fp32"),
        (HOPELESS_BF16, "fp32", "fp32"),
        (SLOW_PRODUCT_FAST_PASS, "fp32", "bf16"),
        (FAST_FP16, "fp32", "fp32"),
    ],
)
def test_auto_takes_bf16_only_where_it_measured_faster(
    cpu: DeviceRates, training: str, decoding: str
) -> None:
    assert training_dtype(card(cpu)) == resolve_dtype("auto", card(cpu), purpose="training") == training
    assert decoding_dtype(card(cpu)) == resolve_dtype("auto", card(cpu), purpose="decoding") == decoding


def test_the_gpu_decides_where_there_is_one() -> None:
    assert training_dtype(card(XEON_WITHOUT_BF16, gpu=ZEN_5)) == "bf16"
    assert decoding_dtype(card(XEON_WITHOUT_BF16, gpu=ZEN_5)) == "bf16"


def test_a_dtype_given_by_name_is_taken_as_it_is() -> None:
    for name in DTYPES:
        assert resolve_dtype(name, card(XEON_WITHOUT_BF16), purpose="decoding") == name


def test_an_unknown_dtype_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="dtype=float8 is not known; choose from auto, fp32, bf16, fp16"):
        resolve_dtype("float8", card(ZEN_5), purpose="training")


def test_threads_are_those_that_measured_best_unless_the_machine_was_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.machine.card.usable_cores", lambda: 4)
    quiet, busy = card(ZEN_5), card(ZEN_5, busy=True)
    assert num_threads(quiet, "bf16", purpose="training") == 2
    assert num_threads(quiet, "bf16", purpose="decoding") == 1
    assert num_threads(busy, "bf16", purpose="decoding") == busy.cores
    assert num_threads(quiet, "int8", purpose="decoding") == num_threads(quiet, "fp32", purpose="decoding")


@pytest.mark.parametrize("gpu", [None, ZEN_5])
def test_a_card_survives_json(gpu: DeviceRates | None) -> None:
    ours = card(XEON_WITHOUT_BF16, gpu)
    assert MachineCard.from_json(json.loads(json.dumps(ours.to_json()))) == ours


def test_a_card_is_described_by_a_full_table() -> None:
    table = rates_table(card(XEON_WITHOUT_BF16, gpu=ZEN_5))
    assert {len(row) for row in table.rows} == {len(table.header)}
    assert [row[:2] for row in table.rows] == [(where, dtype) for where in ("cpu", "gpu") for dtype in DTYPES]
    assert table.rows[1] == ("cpu", "bf16", "56 GFLOP/s", "2 / 1", "10.3 ms", "1.60", "2.40", "3.50", "4.80")
    assert ("trains in", "fp32") in facts(card(XEON_WITHOUT_BF16))
    assert "note" in dict(facts(card(ZEN_5, busy=True)))


class FakeMeasure:
    """Counts how often it is asked; a card of its own each time."""

    def __init__(self, *, busy: bool = False) -> None:
        self.busy, self.count = busy, 0

    def __call__(self, machine: Machine) -> MachineCard:
        self.count += 1
        measured = f"measurement {self.count}"
        return dataclasses.replace(card(ZEN_5, busy=self.busy), key=machine.key, measured=measured)


def test_a_card_is_measured_once_and_then_read(tmp_path: Path) -> None:
    measure = FakeMeasure()
    first = machine_card(cache_dir=tmp_path / "new", measure=measure)
    assert machine_card(cache_dir=tmp_path / "new", measure=measure) == first
    assert measure.count == 1
    assert machine_card(True, cache_dir=tmp_path / "new", measure=measure).measured == "measurement 2"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_card_is_known_once_it_was_measured_and_never_measured_for_that(tmp_path: Path) -> None:
    assert known_card(cache_dir=tmp_path) is None
    first = machine_card(cache_dir=tmp_path, measure=FakeMeasure())
    assert known_card(cache_dir=tmp_path) == first


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"cpu": 3}', "\xff", None])
def test_a_damaged_card_is_measured_again(tmp_path: Path, damage: str | None) -> None:
    measure = FakeMeasure()
    machine_card(cache_dir=tmp_path, measure=measure)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    path.write_bytes(text.replace("fp32", "fp31").encode() if damage is None else damage.encode("latin1"))
    assert machine_card(cache_dir=tmp_path, measure=measure).measured == "measurement 2"
    assert machine_card(cache_dir=tmp_path, measure=measure).measured == "measurement 2"


def test_a_card_from_a_busy_machine_is_replaced_once_it_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_card(cache_dir=tmp_path, measure=FakeMeasure(busy=True))
    quiet = FakeMeasure()
    monkeypatch.setattr("models.machine.card.busy_now", lambda: True)
    assert machine_card(cache_dir=tmp_path, measure=quiet).busy
    monkeypatch.setattr("models.machine.card.busy_now", lambda: False)
    assert not machine_card(cache_dir=tmp_path, measure=quiet).busy
    assert quiet.count == 1


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert machine_card(cache_dir=tmp_path / "file", measure=FakeMeasure()).measured == "measurement 1"


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine_card(measure=FakeMeasure())
    assert [path.name for path in (tmp_path / "nestling").iterdir()] == [f"machine-{this_machine().key}.json"]


def test_another_processor_torch_or_gpu_has_a_card_of_its_own() -> None:
    machine = this_machine()
    changes = ({"features": ("x",)}, {"cores": 999}, {"torch_version": "0"}, {"gpu": "H"}, {"cpu": "y"})
    others = [dataclasses.replace(machine, **change) for change in changes]
    assert len({one.key for one in (machine, *others)}) == 1 + len(changes)


def test_a_damaged_card_names_the_remedy() -> None:
    with pytest.raises(NestlingError, match="measure again"):
        MachineCard.from_json({"cpu": None})


class FakeClock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *durations: float) -> Work:
        """Work that takes the given times in turn, the last one for ever."""
        left = list(durations)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_cells_are_warmed_up_and_then_take_turns() -> None:
    clock = FakeClock()
    alternate({"a": clock.work("a", 1.0), "b": clock.work("b", 2.0)}, budget=0, clock=clock)
    assert clock.log == ["a", "b"] * 4


def test_a_disturbance_does_not_change_a_cells_time() -> None:
    clock = FakeClock()
    cells = {"a": clock.work("a", 90.0, 1.0, 7.0, 1.0), "b": clock.work("b", 50.0, 9.0, 2.0)}
    timings = alternate(cells, budget=0, clock=clock)
    assert timings.shortest == {"a": 1.0, "b": 2.0}
    assert timings.median == {"a": 1.0, "b": 2.0}
    assert timings.noise == 0


def test_rounds_end_with_the_budget() -> None:
    clock = FakeClock()
    alternate({"a": clock.work("a", 1.0)}, budget=4.5, clock=clock)
    assert len(clock.log) == 1 + 5


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_load_counts_what_others_did(tmp_path: Path) -> None:
    ticks = 100  # of every Linux that Python runs on
    before = Load.now(write(tmp_path / "stat", f"cpu {ticks} 0 0 {ticks} 0 0 0 0 0 0\ncpu0 9\n"))
    others = Load.now(write(tmp_path / "stat", f"cpu {2 * ticks} 0 0 {3 * ticks} 0 0 0 0 0 0\n"))
    idle = Load.now(write(tmp_path / "stat", f"cpu {ticks} 0 0 {9 * ticks} 0 0 0 0 0 0\n"))
    assert others.total - before.total == pytest.approx(3)
    assert before.is_busy(others)
    assert not before.is_busy(idle)


def test_our_own_work_is_not_a_disturbance(tmp_path: Path) -> None:
    before = Load.now(write(tmp_path / "stat", "cpu 100 0 0 100 0 0 0 0 0 0\n"))
    start = time.process_time()
    while time.process_time() < start + 0.2:
        pass
    after = Load.now(write(tmp_path / "stat", "cpu 120 0 0 120 0 0 0 0 0 0\n"))
    assert not before.is_busy(after)


def test_a_system_that_does_not_tell_its_load_is_never_busy(tmp_path: Path) -> None:
    assert not Load.now(tmp_path / "absent").is_busy(Load.now(tmp_path / "absent"))


def test_a_processor_is_named_by_its_model_and_features(tmp_path: Path) -> None:
    info = write(tmp_path / "cpuinfo", "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: b a\n\n")
    assert processor_name(info) == ("Some CPU", ("a", "b"))
    arm = write(tmp_path / "cpuinfo", "processor : 0\nFeatures : fp asimd\n")
    assert processor_name(arm)[1] == ("asimd", "fp")
    assert processor_name(tmp_path / "absent")[0]


@pytest.mark.parametrize(
    ("loads", "threads"),
    [
        ("quiet quiet", [[1, 2]]),
        ("quiet busy", [[1, 2], [1]]),
        ("busy", [[1]]),
    ],
)
def test_a_busy_machine_is_measured_with_one_thread(
    monkeypatch: pytest.MonkeyPatch, loads: str, threads: list[list[int]]
) -> None:
    first, *then = [load == "busy" for load in loads.split()]
    moments = iter([Load(0, 0), *(Load(float(is_busy), 1) for is_busy in then)])
    tried: list[list[int]] = []

    def measure(where: torch.device, *, threads: list[int], **_: object) -> DeviceRates:
        tried.append(threads)
        return ZEN_5

    monkeypatch.setattr("models.machine.card.busy_now", lambda: first)
    monkeypatch.setattr("models.machine.card.Load.now", lambda: next(moments))
    monkeypatch.setattr("models.machine.card.measure_device", measure)
    ours = measure_card(dataclasses.replace(this_machine(), cores=2, gpu=None))
    assert tried == threads
    assert ours.busy == ("busy" in loads)


def test_a_real_measurement_is_whole_and_positive() -> None:
    """Structure only: with one small matrix and whatever else this machine does, no figure holds."""
    threads = torch.get_num_threads()
    ours = measure_card(dataclasses.replace(this_machine(), gpu=None), num_matrices=1, budget=0)
    assert torch.get_num_threads() == threads
    assert ours.cpu.read_gbps > 0
    assert ours.cpu.noise >= 0
    assert list(ours.cpu.dtypes) == list(DTYPES)
    assert ours.cpu.dtypes["fp32"].slowdown()[1] == 1
    for measured in ours.cpu.dtypes.values():
        assert measured.product_gflops > 0
        assert 1 <= measured.decode_threads <= ours.cores
        assert all(seconds > 0 for seconds in measured.pass_seconds.values())
    assert rates_table(ours).rows
    assert {training_dtype(ours), decoding_dtype(ours)} <= {"fp32", "bf16"}
