"""Timings of one device: its read bandwidth, and the cost of a matrix product in each dtype.

Decoding a token reads every weight once, so its cost is a matter of bandwidth; training and prefill
are a matter of products. Neither follows from the type of the hardware: the dtype that is fastest on
one CPU is a trap on the next. Cells are timed in turn, round after round, so that a disturbance hits
each alike; since it can only add time, a cell's time is the shortest of its runs.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.base.dtypes import DTYPES
from models.base.stopwatch import Clock, Work, alternate
from models.kernels.matmul import compiled_product, compiles
from models.machine.threads import fastest_threads, threaded

PASS_TOKENS = (1, 2, 4, 8, 16)
# Decoding scores one token, verifying a few: the number of threads is chosen for both.
DECODE_TOKENS = (1, 4)
# A dtype whose product is slower than this fraction of fp32's has no kernels of torch's here; without one of
# ours timing its passes could take seconds and would tell nothing.
HOPELESS_FRACTION = 0.25


@dataclass(frozen=True, kw_only=True)
class DtypeRates:
    """Rates of a device in one dtype."""

    product_gflops: float
    """Rate of a large square matrix product, in 1e9 operations per second (2 per multiply-add)."""
    product_threads: int
    """The best number of threads for such a product."""
    decode_threads: int
    """The best number of threads for passes over the weights on a few tokens."""
    pass_seconds: dict[int, float]
    """Tokens -> seconds of a pass over 24 matrices of 768 x 3072; empty if the dtype is hopeless."""

    def slowdown(self) -> dict[int, float]:
        """Return v(m), the cost of a pass on m tokens in passes on one."""
        return {num: value / self.pass_seconds[1] for num, value in self.pass_seconds.items()}


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Measured rates of a device."""

    name: str
    memory_bytes: int
    read_gbps: float
    """Read bandwidth of its memory, in 1e9 bytes per second."""
    dtypes: dict[str, DtypeRates]
    noise: float
    """Excess of a typical run over the shortest one, as a fraction of it."""


def measure_device(
    device: torch.device,
    *,
    name: str,
    memory_bytes: int,
    threads: Sequence[int],
    num_matrices: int = 24,
    budget: float = 1.0,
    clock: Clock = time.perf_counter,
) -> DeviceRates:
    """Measure one device, in two or three seconds.

    Args:
        threads: the numbers of threads to try; the rates are those at the best one.
        num_matrices: number of matrices that make up the weights of a pass; fewer than exceed the caches
            only where the figures do not matter.
        budget: seconds for each of two phases, threads and rates; every cell runs thrice at least.
        clock: returns the time in seconds.
    """
    threads_before = torch.get_num_threads()
    try:
        bench = _Bench(device, num_matrices, cores=max(threads), clock=clock)
        best = bench.choose_threads(threads, budget)
        timings = alternate(bench.cells(best), budget=budget, clock=clock)
    finally:
        torch.set_num_threads(threads_before)
    return DeviceRates(
        name=name,
        memory_bytes=memory_bytes,
        read_gbps=bench.bytes_read / timings.shortest["fp32", "read"] / 1e9,
        dtypes={dtype: bench.rates(dtype, best, timings.shortest) for dtype in DTYPES},
        noise=timings.noise,
    )


class _Bench:
    """The work that is timed on one device. A cell is (dtype, what)."""

    def __init__(self, device: torch.device, num_matrices: int, cores: int, clock: Clock) -> None:
        self.device, self.clock = device, clock
        torch.set_num_threads(1)  # whether a dtype is hopeless shows in one, and few others disturb it
        self.products = {dtype: self._sized_product(dtype, cores) for dtype in DTYPES}
        products = {dtype: work for dtype, (_, work) in self.products.items()}
        seconds = alternate(products, budget=0, clock=clock).shortest
        rates = {dtype: side**3 / seconds[dtype] for dtype, (side, _) in self.products.items()}
        self.useful = [
            dtype
            for dtype in DTYPES
            if rates[dtype] >= HOPELESS_FRACTION * rates["fp32"] or compiles(DTYPES[dtype], device)
        ]
        # One matrix, repeated: random numbers for all of them would take longer than the timing.
        matrix_OI = torch.randn(3072, 768, device=device)
        self.weights = {
            dtype: matrix_OI.to(DTYPES[dtype]).expand(num_matrices, -1, -1).contiguous()
            for dtype in self.useful
        }
        self.passes = {
            dtype: [
                compiled_product(weight_OI) or functools.partial(F.linear, weight=weight_OI)
                for weight_OI in weights_LOI
            ]
            for dtype, weights_LOI in self.weights.items()
        }
        self.bytes_read = self.weights["fp32"].nbytes

    def choose_threads(self, counts: Sequence[int], budget: float) -> dict[tuple[str, str], int]:
        """Return the best number of threads, out of `counts`, for each (dtype, "product" or "decode")."""
        cells = {(dtype, "product"): work for dtype, (_, work) in self.products.items()}
        cells |= {(dtype, "decode"): self._weights_pass(dtype, *DECODE_TOKENS) for dtype in self.useful}
        return fastest_threads(cells, counts, budget=budget, clock=self.clock)

    def cells(self, threads: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], Work]:
        """List all that is timed. Neighbours read different weights: none finds its own in a cache."""
        cells = {
            (dtype, "product"): threaded(work, threads[dtype, "product"])
            for dtype, (_, work) in self.products.items()
        }
        cells |= {
            (dtype, str(num)): threaded(self._weights_pass(dtype, num), threads[dtype, "decode"])
            for num in PASS_TOKENS
            for dtype in self.useful
        }
        return cells | {("fp32", "read"): threaded(self._read, max(threads.values()))}

    def rates(
        self,
        dtype: str,
        threads: Mapping[tuple[str, str], int],
        seconds: Mapping[tuple[str, str], float],
    ) -> DtypeRates:
        """Return what the timings of `cells` say about one dtype."""
        tokens = PASS_TOKENS if dtype in self.useful else ()
        return DtypeRates(
            product_gflops=2e-9 * self.products[dtype][0] ** 3 / seconds[dtype, "product"],
            product_threads=threads[dtype, "product"],
            decode_threads=threads.get((dtype, "decode"), threads[dtype, "product"]),
            pass_seconds={num: seconds[dtype, str(num)] for num in tokens},
        )

    def _sized_product(self, dtype: str, cores: int) -> tuple[int, Work]:
        """Return the side of a square product that keeps all cores busy for a while, and the work."""
        side = 256
        while True:
            work = self._product(dtype, side)
            seconds = alternate({dtype: work}, budget=0, clock=self.clock).shortest[dtype]
            if seconds > 2e-3 * cores or side >= 8192:
                return side, work
            side *= 2

    def _product(self, dtype: str, side: int) -> Work:
        a_NN = torch.ones(side, side, dtype=DTYPES[dtype], device=self.device)

        def work() -> None:
            F.linear(a_NN, a_NN)
            self._wait()

        return work

    def _weights_pass(self, dtype: str, *tokens: int) -> Work:
        like = self.weights[dtype]
        inputs = [like.new_ones(num, like.shape[-1]) for num in tokens]

        def work() -> None:
            for x_TI in inputs:
                for product in self.passes[dtype]:
                    product(x_TI)
            self._wait()

        return work

    def _read(self) -> None:
        flat = self.weights["fp32"].view(-1)
        torch.dot(flat, flat)
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a launch returns before its work is done
