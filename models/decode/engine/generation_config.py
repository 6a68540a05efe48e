"""Settings of a continuation: one frozen value from the command line down to the engine."""

from collections.abc import Collection
from dataclasses import dataclass

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
    eos_token_ids: Collection[int] | None = None
    """Tokens that end the output (and are its last token); None means the model's."""
    stop: Collection[str] = ()
    """Texts that end the output, wherever they begin or end; they are not part of it."""
    seed: int = 0
    """Random seed; each row of a batch derives its own random numbers from it."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")


DEFAULT = GenerationConfig()
