"""A model folder and its draft, opened in one call as `nestling generate` opens them; it continues texts.

    decoder = open_decoder("checkpoints/demo/model", draft="auto")
    decoder.generate("def main(").text

Who drafts depends on the law (greedy, or sampled how), which is therefore settled here, once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from tokenizers import Tokenizer

from models.base.errors import NestlingError, UsageError
from models.checkpoint.folder import ModelFolder
from models.decode.engine.draft import renewed
from models.decode.engine.engine import GREEDY
from models.decode.engine.policy import Fixed, Policy
from models.decode.open import open_for_decoding
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.samplers import COUPLED, check_verifier
from models.decode.text import GenerationResult, TextStream, generate_batch, stream_text
from models.decode.tune.resolve import AUTO, Drafting, choose_drafting, make_policy


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Continues texts by one law and draft; see `open_decoder`."""

    folder: ModelFolder
    tokenizer: Tokenizer
    dtype: str
    """That the model runs in."""
    params: SamplingParams
    drafting: Drafting
    adapts: bool
    """Whether the number of drafted tokens follows what a text measures; in a batch it never does."""
    copies: bool
    """Whether earlier text is one more draft, in a text that adapts."""

    def stream(
        self, prompt: str, *, max_new_tokens: int = 128, stop: Collection[str] = (), seed: int = 0
    ) -> TextStream:
        """Continue a prompt, piece by piece; `.result()` is what was taken so far, with its report.

        Args:
            prompt: the text to continue; if empty, the model's start (or end) token stands for it.
            max_new_tokens: the most tokens to write; the context's end may come first.
            stop: texts that end the output, and are no part of it.
            seed: of every random choice.

        Raises:
            UsageError: if the prompt leaves no room in the context, or is empty without a start token.
        """
        return stream_text(
            self.folder.model,
            self.tokenizer,
            prompt,
            policy=self._new_policy(),
            **self._options(max_new_tokens, stop, seed),
        )

    def generate(
        self, prompt: str, *, max_new_tokens: int = 128, stop: Collection[str] = (), seed: int = 0
    ) -> GenerationResult:
        """Continue a prompt; the arguments are those of `stream`."""
        pieces = self.stream(prompt, max_new_tokens=max_new_tokens, stop=stop, seed=seed)
        for _ in pieces:
            pass
        return pieces.result()

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        stop: Collection[str] = (),
        seed: int = 0,
    ) -> list[GenerationResult]:
        """Continue several prompts, whose passes share the reading of the weights; see `stream`.

        Rounds take as long as their companions', and a clock tells nothing of a draft: every text drafts
        `drafting.gamma` tokens a round.
        """
        drafting = self.drafting
        return generate_batch(
            self.folder.model,
            self.tokenizer,
            prompts,
            new_policy=lambda: Fixed(
                drafting.draft and renewed(drafting.draft), drafting.gamma, drafting.name
            ),
            **self._options(max_new_tokens, stop, seed),
        )

    def _new_policy(self) -> Policy:
        return make_policy(self.folder, self.drafting, self.params, adapts=self.adapts, copies=self.copies)

    def _options(self, max_new_tokens: int, stop: Collection[str], seed: int) -> "_Options":
        return {
            "params": self.params,
            "max_new_tokens": max_new_tokens,
            "stop": stop,
            "seed": seed,
            "verifier": self.drafting.verifier,
        }


class _Options(TypedDict):
    params: SamplingParams
    max_new_tokens: int
    stop: Collection[str]
    seed: int
    verifier: str


def open_decoder(
    path: str | Path,
    *,
    draft: str | None = None,
    gamma: int | Literal["auto"] | None = None,
    params: SamplingParams = GREEDY,
    verifier: str | None = None,
    dtype: str = "auto",
) -> Decoder:
    """Open a model folder and what drafts for it, packed, with the fastest threads.

    Args:
        path: the model folder, with its tokenizer.
        draft: a member of the family or a granularity, perhaps in a precision (`S@int8`); another model
            folder; `auto`, `lookup` or `none`. None is `auto` where the text does not depend on it, which
            is greedily and by `coupled`, else `none`.
        gamma: drafted tokens a round; `auto` follows what it measures. None is `auto` where the text does
            not depend on it or the draft is `auto`, else 4.
        params: how tokens are chosen.
        verifier: `token`, `block` or `coupled`; None takes what is best with the draft, never `coupled`.
        dtype: as `open_in_dtype` takes it.

    Raises:
        UsageError: if there is no folder at `path`, or a name or number makes no sense.
        NestlingError: if a folder is damaged, or has no tokenizer.
    """
    if verifier is not None:
        check_verifier(verifier)
    number = gamma if isinstance(gamma, int) else None
    if number is not None and number < 0:
        raise UsageError(f"--gamma must be 0 or more, or auto, got {number}")
    folder, dtype = open_for_decoding(path, dtype)
    if folder.tokenizer is None:
        raise NestlingError(f"{path} has no tokenizer.json; put the one it was trained with there")
    repeats = params.is_greedy or verifier == COUPLED  # the text does not depend on who drafts
    draft = draft or (AUTO if repeats else "none")
    return Decoder(
        folder=folder,
        tokenizer=folder.tokenizer,
        dtype=dtype,
        params=params,
        drafting=choose_drafting(folder, draft, number, params, dtype=dtype, verifier=verifier),
        adapts=number is None and draft != "none" and (AUTO in (gamma, draft) or repeats),
        copies=draft == AUTO and number is None,
    )
