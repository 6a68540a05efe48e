"""The number of threads that an engine is fastest with, by its own decoding."""

from functools import partial

from models.bench.engines import Engine
from models.machine.threads import fastest_threads, thread_counts

# Long enough that what is done once a request weighs little.
NUM_TOKENS = 12
BUDGET = 0.5


def engine_threads(engine: Engine, most: int, *, context: int) -> int:
    """Return the smallest number of threads, up to `most`, with which the engine is about as fast as it gets.

    Args:
        engine: the engine.
        most: the largest number to try.
        context: positions that it can hold.
    """
    prompt_ids = [0] * max(1, min(NUM_TOKENS, context - NUM_TOKENS))
    work = partial(_decode, engine, prompt_ids)
    return fastest_threads({"": work}, thread_counts(most), budget=BUDGET)[""]


def _decode(engine: Engine, prompt_ids: list[int]) -> None:
    engine.decode(prompt_ids, max_new_tokens=NUM_TOKENS, seed=0)
