"""llama.cpp behind the bench's verb, through its Python package, which is imported only when it is used.

Drafted decoding is the package's own loop: a model of its own proposes its likeliest tokens, the target's
sampler draws at each position, and what is drawn must be what was proposed. That is exact at any temperature.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from models.bench.engines import Sample
from models.decode.sampling.params import SamplingParams

MISSING = (
    "llama.cpp is left out: pip install 'nestling[llama]' builds its Python package, and int8 needs widths "
    "that 32 divides"
)


def is_installed() -> bool:
    """Return whether both packages are there: the one that writes its files, and the one that runs them."""
    return all(find_spec(name) is not None for name in ("gguf", "llama_cpp"))


class Llamas:
    """A model of llama.cpp, and another one that drafts for it; each is opened when it is first used.

    Args:
        path: the target, a GGUF file.
        num_positions: of the longest prompt with its continuation and a proposal.
        draft: another GGUF file, or None for plain decoding.
    """

    def __init__(self, path: Path, num_positions: int, draft: Path | None = None) -> None:
        self.drafter = None if draft is None else _Drafter(draft, num_positions)
        self._open = functools.partial(open_llama, path, num_positions, self.drafter)

    @functools.cached_property
    def target(self) -> Any:
        """The model that verifies, and writes."""
        return self._open()

    def forget(self) -> None:
        """Forget all that both were given: a prompt that they knew would need no pass."""
        self.target.reset()
        if self.drafter is not None:
            self.drafter.llama.reset()

    def set_threads(self, count: int) -> None:
        """Set the threads of both, for passes on one token and on several."""
        import llama_cpp

        for one in [self.target, *([self.drafter.llama] if self.drafter else [])]:
            llama_cpp.llama_set_n_threads(one.ctx, count, count)


@dataclass(frozen=True, kw_only=True)
class LlamaEngine:
    """`Llama.generate` of llama-cpp-python, with torch's number of threads."""

    llamas: Llamas
    params: SamplingParams
    """Only the temperature, greedy included."""
    gamma: int = 0
    """Drafted tokens a round."""

    def decode(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Sample:
        """See `Engine`."""
        drafter = self.llamas.drafter
        if drafter is not None:
            drafter.gamma, drafter.num_calls = self.gamma, 0
        self.llamas.forget()
        self.llamas.set_threads(torch.get_num_threads())
        self.llamas.target.set_seed(seed)
        start = perf_counter()
        tokens: Iterator[int] = self.llamas.target.generate(
            list(prompt_ids),
            temp=self.params.temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repeat_penalty=1.0,
        )
        ids = [next(tokens)]
        first_seconds = perf_counter() - start
        ids += islice(tokens, max_new_tokens - 1)
        return Sample(
            ids=ids,
            first_tokens=1,
            first_seconds=first_seconds,
            seconds=perf_counter() - start,
            passes=max_new_tokens - 1 if drafter is None else drafter.num_calls,
        )


class _Drafter:
    """The draft model that the package calls before each pass but the first."""

    def __init__(self, path: Path, num_positions: int) -> None:
        self.gamma = self.num_calls = 0
        self._open = functools.partial(open_llama, path, num_positions)

    @functools.cached_property
    def llama(self) -> Any:
        return self._open()

    def __call__(self, input_ids: Any, **options: Any) -> Any:
        import numpy as np

        self.num_calls += 1
        tokens = self.llama.generate(input_ids.tolist(), temp=0.0)  # goes on from the prefix that it knows
        return np.array(list(islice(tokens, self.gamma)), dtype=np.intc)


def open_llama(path: Path, num_positions: int, drafter: Any = None, **options: Any) -> Any:
    """Open a model of llama.cpp.

    Where the processor multiplies tiles (AMX) it keeps the weights as they are on disk: laid out for tiles,
    8-bit ones end the process (https://github.com/ggml-org/llama.cpp/issues/20824).
    """
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without_tiles() -> Any:
        found = defaults()
        found.use_extra_bufts = found.use_extra_bufts and not torch.cpu._is_amx_tile_supported()
        return found

    llama_cpp.llama_model_default_params = without_tiles
    try:
        return Llama(str(path), n_ctx=num_positions, draft_model=drafter, verbose=False, **options)
    finally:
        llama_cpp.llama_model_default_params = defaults
