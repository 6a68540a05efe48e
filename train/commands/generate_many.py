"""`nestling generate --prompts`: many texts in batches; what is done is written while the rest is decoded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

from models.base.paths import is_stream
from models.base.progress import progress_bar
from train.commands.common import PRINTED, write_results
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.checkpoint.chat import Message
    from models.decode.decoder import Decoder
    from models.decode.prompts import Prompt
    from models.decode.text import GenerationResult, TextOrIds

Encode: TypeAlias = "Callable[[str], TextOrIds]"
"""Makes of a prompt what the model continues: itself, or the ids of a chat template."""
WRITE_SECONDS = 5.0
"""The least time between two writes of unfinished results."""


class Answers:
    """The texts that `--prompts` gave so far; `--json` has them while the rest is decoded, and if that fails.

    Args:
        prompts: all of them.
        settings: other fields of the results.
        path: file of the results; None writes none.
        messages: the conversation that each prompt begins, of `--chat`.
        dtype: that the model runs in.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        settings: dict[str, Any],
        path: Path | None,
        dtype: str,
        messages: "Callable[[str], list[Message]] | None" = None,
    ) -> None:
        self.messages = messages
        self.prompts, self.settings, self.path, self.dtype = prompts, settings, path, dtype
        self.done: list[GenerationResult] = []
        self._started = self._written = perf_counter()
        self._replaceable = path is not None and path != PRINTED and not is_stream(path)

    def summary(self) -> str:
        """Return how many there are, and how fast they came."""
        return f"{len(self.done)} texts, {self._num_tokens} tokens · {self._rate:.1f} tokens/s"

    def write_now_and_then(self) -> None:
        """Write what there is, unless that was done a moment ago or what is written cannot be replaced."""
        if self._replaceable and perf_counter() - self._written > WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what there is."""
        each = [self._record(prompt, one) for prompt, one in zip(self.prompts, self.done, strict=False)]
        counts = {"num_prompts": len(self.prompts), "tokens_per_second": self._rate}
        write_results(self.path, {"results": each, **counts, **self.settings}, dtypes={"model": self.dtype})
        self._written = perf_counter()

    def _record(self, prompt: str, one: "GenerationResult") -> dict[str, Any]:
        if self.messages is None:
            return {"prompt": prompt, **one.as_dict()}
        answer = {"role": "assistant", "content": one.text}
        return {"prompt": prompt, "messages": [*self.messages(prompt), answer], **one.as_dict()}

    @property
    def _num_tokens(self) -> int:
        return sum(one.report.num_tokens for one in self.done)

    @property
    def _rate(self) -> float:
        return self._num_tokens / max(perf_counter() - self._started, 1e-9)


def continue_many(
    decoder: "Decoder", answers: Answers, encode: Encode, batch_size: int, options: dict[str, Any]
) -> None:
    """Continue the prompts in batches, show the texts of a batch when it is done, and say how it went."""
    from models.decode.summary import describe_draft

    errors = make_console(stderr=True)
    try:
        _decode_batches(decoder, answers, encode, batch_size, options, errors)
    finally:
        if answers.done:
            answers.write()
    line = f"{answers.summary()} · {describe_draft(decoder, in_batch=True)} · batches of {batch_size}"
    errors.print(line, style="dim", markup=False, soft_wrap=True)


def _decode_batches(
    decoder: "Decoder",
    answers: Answers,
    encode: Encode,
    batch_size: int,
    options: dict[str, Any],
    errors: Console,
) -> None:
    console, prompts = make_console(), answers.prompts
    with progress_bar("decoding", len(prompts), console=errors) as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            done = decoder.generate_batch([encode(prompt) for prompt in batch], first_row=first, **options)
            for prompt, result in zip(batch, done, strict=True):
                console.file.write(f"{prompt}{result.text}\n\n")
            console.file.flush()
            answers.done += done
            answers.write_now_and_then()
            bar.advance(len(batch))


def check_lines(decoder: "Decoder", lines: "Sequence[Prompt]", encode: Encode) -> None:
    """Check that each prompt leaves room for a new token, before any of them is decoded.

    Raises:
        UsageError: naming the first line that cannot be continued.
    """
    from models.decode.prompts import check_prompts

    config = decoder.folder.model.config
    has_start = config.bos_token_id is not None or config.first_eos_token_id is not None

    def ids(text: str) -> Sequence[int]:
        prompt = encode(text)
        return decoder.tokenizer.encode(prompt).ids if isinstance(prompt, str) else list(prompt)

    context = config.max_position_embeddings
    check_prompts(lines, ids, context=context, has_start=has_start)
