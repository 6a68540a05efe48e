"""The cores and the memory that this process may use, and the load that others put on them right now."""

import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.base.errors import UsageError

# A machine is busy when other processes take more than this fraction of its processors' time.
BUSY_FRACTION = 0.15


@dataclass(frozen=True)
class Load:
    """Processor seconds since the system started: those that others took, and all, idle ones too."""

    others: float
    total: float

    @staticmethod
    def now(stat: Path = Path("/proc/stat")) -> "Load":
        """Read the counters; zeros where the system keeps none there, and such a machine is never busy."""
        if not stat.exists():
            return Load(0.0, 0.0)
        # user nice system idle iowait irq softirq steal: https://man7.org/linux/man-pages/man5/proc_stat.5.html
        ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        per_second = os.sysconf("SC_CLK_TCK")
        active = sum(ticks) - ticks[3] - ticks[4]
        return Load(active / per_second - time.process_time(), sum(ticks) / per_second)

    def is_busy(self, later: "Load") -> bool:
        """Return True if others kept the machine busy between this moment and a later one.

        >>> Load(0.0, 10.0).is_busy(Load(1.0, 12.0))
        True
        """
        return later.others_since(self) > BUSY_FRACTION

    def others_since(self, earlier: "Load") -> float:
        """Return the fraction of the time of all cores that others took since an earlier moment.

        >>> Load(1.0, 12.0).others_since(Load(0.0, 10.0))
        0.5
        """
        total = self.total - earlier.total
        return (self.others - earlier.others) / total if total > 0 else 0.0


def busy_now(seconds: float = 0.1) -> bool:
    """Watch for a moment whether others keep the machine busy."""
    before = Load.now()
    time.sleep(seconds)
    return before.is_busy(Load.now())


def is_crowded(loads: Path = Path("/proc/loadavg"), *, looks: int = 4) -> bool:
    """Return whether so many other threads run that ours, one on each core that we may use, must share.

    It looks a few times within milliseconds and takes the least: what runs for a moment only is no crowd.
    """
    if not loads.exists():
        return False
    cores = os.cpu_count() or 1
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    for _ in range(looks):
        # "0.20 0.18 0.12 2/345 6789": threads that run at this moment, ours among them
        others = int(loads.read_text().split()[3].partition("/")[0]) - 1
        if others + ours <= cores:  # a quiet machine is seen at the first look, without a wait
            return False
        time.sleep(0.001)
    return True


def usable_cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many cores this process may use, which is also the most threads that it takes.

    The quota of its control group counts, and of every group around that one: threads beyond it are
    throttled. `OMP_NUM_THREADS` counts, too. A child that was forked after threads were in use has one: the
    others did not survive, and whoever waits for them does so for ever.

    Raises:
        UsageError: if OMP_NUM_THREADS is no number of threads.
    """
    if _forked:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [math.floor(quota) for quota in _quotas(groups, own)]
    return max(1, min([cores, *quotas, *_openmp_threads()]))


def one_thread_after_fork() -> None:
    """From now on a forked child of this process knows that it has one thread."""
    if not _watches_forks and hasattr(os, "register_at_fork"):
        _watches_forks.append(True)
        os.register_at_fork(after_in_child=_alone)


_watches_forks: list[bool] = []
_forked: list[bool] = []


def _alone() -> None:
    _forked.append(True)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _openmp_threads() -> list[int]:
    """Return what OMP_NUM_THREADS allows: a number, or one for each level of nesting."""
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not value:
        return []
    first = value.partition(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise UsageError(f"OMP_NUM_THREADS={value}: give a number of threads, 1 or more, or unset it")
    return [int(first)]


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """Yield the cores' worth of time that this process's control groups grant, of version 2 and 1."""
    lines = own.read_text().splitlines() if own.exists() else []
    for line in lines or ["0::/"]:
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / controllers if controllers else groups
        inside = root / name.strip().lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(root):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Yield what one group grants; see https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu."""
    try:
        if (folder / "cpu.max").is_file():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if limit != "max" and float(limit) > 0 and float(period) > 0:
            yield float(limit) / float(period)
    except (OSError, ValueError):  # none, or of a kind that is not known
        return


def processor_name(info: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """Return the model's name, and its instruction sets and other features, sorted."""
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = fields.get("flags") or fields.get("Features") or ""  # x86 or ARM
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(sorted(features.split()))


def memory_bytes() -> int:
    """Return the size of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(info: Path = Path("/proc/meminfo")) -> int:
    """Return the main memory that a process could still take; all of it where the system does not tell."""
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else memory_bytes()


def peak_memory_bytes() -> int:
    """Return the most main memory that this process ever held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak if sys.platform == "darwin" else peak * 1024
    )  # https://man7.org/linux/man-pages/man2/getrusage.2.html
