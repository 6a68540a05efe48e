"""What this process may use of the machine, and how much of it others are using right now."""

import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# A machine is busy when other processes take more than this share of its processors' time.
BUSY_SHARE = 0.15


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
        """Whether others kept the machine busy between this moment and a later one.

        >>> Load(0.0, 10.0).is_busy(Load(1.0, 12.0))
        True
        """
        total = later.total - self.total
        return total > 0 and (later.others - self.others) / total > BUSY_SHARE


def busy_now(seconds: float = 0.1) -> bool:
    """Watch for a moment whether others keep the machine busy."""
    before = Load.now()
    time.sleep(seconds)
    return before.is_busy(Load.now())


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use. A container's quota counts: threads beyond it are throttled."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, _, period = quota.read_text().partition(" ") if quota.exists() else ("max", "", "")
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))


def processor_name(info: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """The model's name, and its instruction sets and other features, sorted."""
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    features = fields.get("flags") or fields.get("Features") or ""  # x86 or ARM
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, tuple(sorted(features.split()))


def memory_bytes() -> int:
    """Main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(info: Path = Path("/proc/meminfo")) -> int:
    """Main memory that a process could still take; all of it where the system does not tell."""
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else memory_bytes()


def peak_memory_bytes() -> int:
    """The most main memory that this process ever held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak if sys.platform == "darwin" else peak * 1024
    )  # https://man7.org/linux/man-pages/man2/getrusage.2.html
