"""A model folder and its draft, opened in one call as `nestling generate` opens them; it continues texts.

    decoder = open_decoder("checkpoints/demo/model", draft="auto")
    decoder.generate("def main(").text

Who drafts depends on how tokens are chosen (greedily, or sampled how), which is therefore set here, once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from models.base.errors import NestlingError, UsageError
from models.base.kinds import one_path, whole_number
from models.checkpoint.chat import Message, render_chat
from models.checkpoint.folder import ModelFolder
from models.decode.engine.generation_config import GenerationConfig, changed
from models.decode.engine.policy import NO_DRAFT
from models.decode.open import open_for_decoding
from models.decode.sampling.params import GREEDY, SamplingParams
from models.decode.sampling.samplers import COUPLED, check_verifier
from models.decode.text import GenerationResult, TextOrIds, TextStream, generate_batch, stream_text
from models.decode.tune.resolve import AUTO, Drafting, choose_drafting, make_policy


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Continues texts with one draft and one way of choosing tokens; see `open_decoder`."""

    folder: ModelFolder
    tokenizer: Tokenizer
    dtype: str
    """The dtype that the model runs in."""
    config: GenerationConfig
    """The settings of every text, unless a call says otherwise."""
    drafting: Drafting

    def stream(self, prompt: TextOrIds, **changes: Any) -> TextStream:
        """Continue a prompt, piece by piece; `.result()` is what was taken so far, with its report.

        Args:
            prompt: the text to continue, or its token ids; if empty, the model's start (or end)
                token stands for it.
            changes: settings for this text, as `changed` takes them: max_new_tokens, max_length, temperature,
                do_sample, seed. What transformers calls otherwise has its name there.

        Raises:
            UsageError: if the prompt leaves no room in the context, or is empty without a start token.
        """
        config, drafting = changed(self.config, changes), self.drafting
        if config.params != self.config.params and not config.params.is_greedy:
            drafting = replace(drafting, adapts=False)  # the clock must not decide the text
        policy = make_policy(self.folder, drafting, config.params)
        return stream_text(self.folder.model, self.tokenizer, prompt, config, policy=policy)

    def generate(self, prompt: TextOrIds, **changes: Any) -> GenerationResult:
        """Continue a prompt; the arguments are those of `stream`."""
        return self.stream(prompt, **changes).finish()

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return a conversation as the token ids after which the model answers, by its chat template.

        Args:
            messages: each with `role` (system, user or assistant) and `content`.

        Raises:
            NestlingError: if the model has no chat template, or it does not take these messages.
        """
        template = self.folder.chat_template
        if template is None:
            raise NestlingError(
                f"{self.folder.path} has no chat template; take a chat model, or leave --chat out"
            )
        config = self.folder.model.config
        text = render_chat(
            template,
            messages,
            bos_token=self._text_of(config.bos_token_id),
            eos_token=self._text_of(config.first_eos_token_id),
        )
        # The template has put special tokens already; for the batch of one see `encode_prompt`.
        return self.tokenizer.encode_batch([text], add_special_tokens=False)[0].ids

    def _text_of(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.id_to_token(token) or ""

    def generate_batch(
        self, prompts: Iterable[TextOrIds], *, first_row: int = 0, **changes: Any
    ) -> list[GenerationResult]:
        """Continue several prompts, whose passes share the reading of the weights; see `stream`.

        Rounds take as long as their companions', and a clock tells nothing of a draft: every text drafts
        `drafting.gamma` tokens a round. Where many prompts are continued in several batches, `first_row` is
        the number of those before, so that no text repeats another's random numbers.
        """
        config = changed(self.config, changes)
        drafting = replace(self.drafting, adapts=False, costs=None)
        return generate_batch(
            self.folder.model,
            self.tokenizer,
            prompts,
            config,
            new_policy=lambda: make_policy(self.folder, drafting, config.params),
            first_row=first_row,
        )


def open_decoder(
    path: str | Path,
    *,
    draft: str | Path | None = None,
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
        params: settings of sampling.
        verifier: `token`, `block` or `coupled`; None takes what is best with the draft, never `coupled`.
        dtype: as `open_for_decoding` takes it.

    Raises:
        UsageError: if there is no folder at `path`, or a name or number makes no sense.
        NestlingError: if a folder is damaged, or has no tokenizer.
    """
    if verifier is not None:
        check_verifier(verifier)
    follows = gamma is None or (isinstance(gamma, str) and gamma == AUTO)
    number = None if follows else whole_number("gamma", gamma)
    if number is not None and number < 0:
        raise UsageError(f"--gamma must be 0 or more, or auto, got {number}")
    config = GenerationConfig(params=params)  # refuses what are no params
    draft = draft if isinstance(draft, str | None) else str(one_path("draft", draft))
    folder, dtype = open_for_decoding(one_path("path", path), dtype)
    if folder.tokenizer is None:
        raise NestlingError(f"{path} has no tokenizer.json; put the one it was trained with there")
    repeats = params.is_greedy or verifier == COUPLED  # the text does not depend on who drafts
    draft = draft or (AUTO if repeats else NO_DRAFT)
    drafting = choose_drafting(folder, draft, number, params, dtype=dtype, verifier=verifier)
    return Decoder(
        folder=folder,
        tokenizer=folder.tokenizer,
        dtype=dtype,
        config=replace(config, verifier=drafting.verifier),
        drafting=replace(
            drafting,
            adapts=number is None and draft != NO_DRAFT and (AUTO in (gamma, draft) or repeats),
            copies=draft == AUTO and number is None,
        ),
    )
