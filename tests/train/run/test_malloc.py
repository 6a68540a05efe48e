import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from train.run.malloc import keep_freed_memory


def allocate_and_free() -> int:
    """Pages that the system had to clear for a few arrays of 16 and 64 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    small = [torch.ones(2**22) for _ in range(4)]
    doubled = [2 * x for x in small]
    del small
    large = [torch.ones(2**24) for _ in range(2)]
    del doubled, large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults(keep: bool) -> tuple[bool, int]:
    """Of four rounds, after two in which memory is first taken."""
    torch.set_num_threads(1)
    told = keep and keep_freed_memory()
    return told, sum([allocate_and_free() for _ in range(6)][2:])


def in_a_fresh_process(keep: bool) -> tuple[bool, int]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(faults, keep).result()


def test_most_of_what_was_freed_is_used_again() -> None:
    told, kept = in_a_fresh_process(keep=True)
    if not told:
        pytest.skip("a C library without mallopt")
    _, cleared = in_a_fresh_process(keep=False)
    assert kept < cleared / 2
