"""Engines to compare: ours and that of transformers, behind one verb and one clock.

Both are timed from outside, from the call to the last token, with everything in between that a user
would wait for: caches that are made, settings that are copied, a draft that reads the prompt. Both
ignore the end-of-text token, so that every engine gives the same number of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from models.decode.engine.engine import stream
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.policy import Fixed, Policy
from models.decode.sampling.params import SamplingParams
from models.elastic.view import Model


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One continuation and what it took."""

    ids: list[int]
    first_tokens: int
    """Tokens that were there at once, after the first target pass."""
    first_seconds: float
    """Time until then."""
    seconds: float
    """Time until the last token."""
    passes: int
    """Target passes after the first."""
    overlap: float = 0.0
    reached: int = 0
    """Sum of sum_v min(p, q), and the number of drafted positions that it is over; see `Report`."""


class Engine(Protocol):
    """Continues prompts."""

    def decode(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Sample:
        """Write exactly `max_new_tokens` tokens; the same seed gives the same ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class OurEngine:
    """`models.decode`, plain without a draft."""

    model: Model
    params: SamplingParams
    new_policy: Callable[[], Policy] = lambda: Fixed(None, 0)
    """Called for each prompt, which no draft may know from before."""
    verifier: str = "block"

    def decode(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Sample:
        """See `Engine`."""
        policy = self.new_policy()
        config = GenerationConfig(
            params=self.params,
            verifier=self.verifier,
            max_new_tokens=max_new_tokens,
            eos_token_ids=(),
            seed=seed,
        )
        start = perf_counter()
        tokens = stream(self.model, prompt_ids, config, policy=policy)
        ids = [next(tokens).id]
        first_seconds = perf_counter() - start
        ids += [token.id for token in tokens]
        return Sample(
            ids=ids,
            first_tokens=1,
            first_seconds=first_seconds,
            seconds=perf_counter() - start,
            passes=tokens.report.rounds,
            overlap=tokens.report.overlap,
            reached=tokens.report.reached,
        )


class Stock(Protocol):
    """The part of a transformers model that is needed here."""

    generation_config: Any

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        ...

    def generate(self, *args: Any, **options: Any) -> Any:
        """Continue a prompt."""
        ...


@dataclass(frozen=True, kw_only=True)
class StockEngine:
    """`generate` of transformers."""

    model: Stock
    params: SamplingParams
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `generate`."""
    assistant: Stock | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Generation settings of the assistant; the library's own where none is given."""

    def decode(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Sample:
        """See `Engine`."""
        options = {**self.options, **_sampling(self.params)}
        if self.assistant is not None:
            # Set each time: some schedules change the settings as they go.
            self.assistant.generation_config.update(**{**DEFAULT_SCHEDULE, **self.schedule})
            options["assistant_model"] = self.assistant
        torch.manual_seed(seed)
        tokens_BT = torch.tensor([prompt_ids], device=self.model.device)
        clock = _Clock()
        with torch.inference_mode():
            ids_BT = self.model.generate(
                tokens_BT,
                attention_mask=torch.ones_like(tokens_BT),
                streamer=clock,
                max_new_tokens=max_new_tokens,
                eos_token_id=None,
                pad_token_id=None,
                **options,
            )
        seconds = perf_counter() - clock.start
        return Sample(
            ids=ids_BT[0, len(prompt_ids) :].tolist(),
            first_tokens=clock.first_tokens,
            first_seconds=clock.first_seconds,
            seconds=seconds,
            passes=clock.num_blocks - 1,
        )


DEFAULT_SCHEDULE = {
    "num_assistant_tokens": None,
    "num_assistant_tokens_schedule": None,
    "assistant_confidence_threshold": None,
}


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Return every setting: those left out differ between the libraries (top_k is 50 there)."""
    penalty = {"repetition_penalty": params.repetition_penalty}
    if params.is_greedy:
        return {"do_sample": False, **penalty}
    return {
        "do_sample": True,
        **penalty,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }


class _Clock:
    """A streamer in transformers' sense: it is given the prompt, then the tokens of each target pass."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.first_tokens = 0
        self.first_seconds = 0.0
        self.num_blocks = -1  # the prompt is no block

    def put(self, tokens: Tensor) -> None:
        self.num_blocks += 1
        if self.num_blocks == 1:
            self.first_seconds = perf_counter() - self.start
            self.first_tokens = tokens.numel()

    def end(self) -> None:
        """Nothing is left to do."""
