"""How many threads an engine is fastest with, by its own decoding."""

from functools import partial

import torch

from models.base.stopwatch import alternate, fewest_threads
from models.bench.engines import Engine
from models.machine.card import thread_counts

# Long enough that what is done once a request weighs little.
NUM_TOKENS = 12
BUDGET = 0.5


def fastest_threads(engine: Engine, most: int, *, context: int) -> int:
    """The smallest number of threads, up to `most`, at which the engine is about as fast as at its best.

    Args:
        engine: what decodes.
        most: the largest number to try.
        context: positions that it can hold.
    """
    if most == 1:
        return 1
    prompt_ids = [0] * max(1, min(NUM_TOKENS, context - NUM_TOKENS))
    before = torch.get_num_threads()
    cells = {count: partial(_decode, engine, prompt_ids, count) for count in thread_counts(most)}
    try:
        return fewest_threads(alternate(cells, budget=BUDGET).shortest)
    finally:
        torch.set_num_threads(before)


def _decode(engine: Engine, prompt_ids: list[int], num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    engine.decode(prompt_ids, max_new_tokens=NUM_TOKENS, seed=0)
