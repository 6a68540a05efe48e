"""Settings of a continuation: one frozen value from the command line down to the engine."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from models.base.errors import UsageError
from models.decode.sampling.params import GREEDY, SamplingParams
from models.decode.sampling.verifiers import Verifier


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of a continuation; the names are those of Hugging Face and vLLM.

    Functions that take one also take its fields as keyword arguments, which then replace its own.
    """

    params: SamplingParams = GREEDY
    """The processors between logits and probabilities."""
    verifier: str | Verifier = "block"
    """`token`, `block`, `coupled` or a function like the first two; greedy decoding has no use for it."""
    max_new_tokens: int = 128
    """The most tokens to write; the context's end may come first."""
    eos_token_ids: Collection[int] | int | None = None
    """Tokens that end the output (and are its last token); one may stand alone; None means the model's."""
    stop: Collection[str] | str | None = ()
    """Texts that end the output, wherever they begin or end; they are not part of it. One may stand alone."""
    seed: int = 0
    """Random seed; each row of a batch derives its own random numbers from it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def end_tokens(self) -> Collection[int] | None:
        """The end tokens as a collection; None means the model's."""
        return (self.eos_token_ids,) if isinstance(self.eos_token_ids, int) else self.eos_token_ids

    @property
    def stop_texts(self) -> Collection[str]:
        """The stop strings as a collection."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


DEFAULT = GenerationConfig()
ALIASES = {"eos_token_id": "eos_token_ids", "stop_strings": "stop"}
"""Hugging Face's names of fields that are called otherwise here."""


def changed(config: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """Return a config with other settings: its own fields, and those of `SamplingParams`.

    Raises:
        UsageError: for a setting that is none, naming the nearest one.

    >>> changed(DEFAULT, {"temperature": 0.7, "stop_strings": "END"}).params.temperature
    0.7
    """
    changes = {ALIASES.get(name, name): value for name, value in changes.items()}
    own = {field.name for field in fields(GenerationConfig)}
    sampling = {field.name for field in fields(SamplingParams)}
    for name in changes.keys() - own - sampling:
        near = difflib.get_close_matches(name, [*own, *sampling, *ALIASES], n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(sorted(own | sampling))}"
        raise UsageError(f"{name} is no setting of a continuation; {hint}")
    of_params = {name: value for name, value in changes.items() if name in sampling}
    of_config = {name: value for name, value in changes.items() if name in own}
    config = replace(config, **of_config)
    return replace(config, params=replace(config.params, **of_params)) if of_params else config
