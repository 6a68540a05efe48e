"""Responses in OpenAI's shapes, whole or in chunks; `usage` also tells tau and alpha.

completion         {"choices": [{"index", "text", "logprobs", "finish_reason"}], "usage"}
chat.completion    {"choices": [{"index", "message", "logprobs", "finish_reason"}], "usage"}
chunks             the same with what is new; a chat's have "delta" in place of "message"
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any

from models.decode.detokenize import Tokenizer
from models.decode.engine.logprobs import Logprobs
from models.serve.job import Job, Update

Json = dict[str, Any]


@dataclass(kw_only=True)
class Answer:
    """The response to one request, which has one job for each choice."""

    model: str
    jobs: Sequence[Job]
    is_chat: bool
    echoes: Sequence[str] = ()
    """The prompts' texts, one for each job, where they are to be echoed."""
    created: int = field(default_factory=lambda: int(time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._offsets = [0] * len(self.jobs)

    def whole(self, updates: Sequence[Update]) -> Json:
        """Return the whole response, from one update for each job that joins all of its."""
        choices = []
        for index, (job, update) in enumerate(zip(self.jobs, updates, strict=True)):
            text = self._echo(index) + update.text
            body = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append(self._choice(index, body, self._logprobs(index, job, update, first=True), update))
        return {**self._head(chunk=False), "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[Json]:
        """Return the chunks that come before any token: a chat's say who speaks, an echo is the prompt."""
        if self.is_chat:
            role: Json = {"delta": {"role": "assistant", "content": ""}}
            bodies = [role] * len(self.jobs)
        else:
            bodies = [{"text": text} for text in self.echoes]
        chunks = [self._choice(index, body, None, Update()) for index, body in enumerate(bodies)]
        return [self._chunk([choice]) for choice in chunks]

    def chunk(self, index: int, update: Update) -> Json:
        """Return what is new of one choice."""
        body: Json = {"text": update.text}
        if self.is_chat:
            body = {"delta": {"content": update.text} if update.text else {}}
        logprobs = self._logprobs(index, self.jobs[index], update, first=False)
        return self._chunk([self._choice(index, body, logprobs, update)])

    def usage_chunk(self) -> Json:
        """Return the chunk that holds nothing but the usage."""
        return self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> Json:
        """Return the counts of tokens, and how well drafts did."""
        reports = [job.report for job in self.jobs]
        firsts = {id(job.prompt_ids): job for job in reversed(self.jobs)}.values()  # n choices share a prompt
        num_prompt = sum(len(job.prompt_ids) for job in firsts)
        num_shared = sum(job.num_shared for job in firsts)
        num_new = sum(report.num_tokens for report in reports)
        accepted, drafted = (sum(getattr(one, name) for one in reports) for name in ("accepted", "drafted"))
        rounds, reached = (sum(getattr(one, name) for one in reports) for name in ("rounds", "reached"))
        overlap = sum(report.overlap for report in reports)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_shared},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            },
            "tau": (num_new - len(reports)) / rounds if rounds else None,
            "alpha": overlap / reached if reached else None,
        }

    def _echo(self, index: int) -> str:
        return self.echoes[index] if self.echoes else ""

    def _head(self, *, chunk: bool) -> Json:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": self.id,
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head(chunk=True), "choices": choices}

    def _choice(self, index: int, body: Json, logprobs: Json | None, update: Update) -> Json:
        return {
            "index": index,
            **body,
            "logprobs": logprobs,
            "finish_reason": update.finish_reason or None,
        }

    def _logprobs(self, index: int, job: Job, update: Update, *, first: bool) -> Json | None:
        if job.logprobs is None or not update.tokens:
            return None
        each = [(token.id, token.logprobs) for token in update.tokens]
        if self.is_chat:
            return {"content": [_chat_logprobs(job.tokenizer, *one) for one in each], "refusal": None}
        start: list[tuple[int, Logprobs | None]] = []
        if job.scores_prompt and (first or self._offsets[index] == 0):
            start = list(zip(job.prompt_ids, [None, *job.prompt_logprobs], strict=True))
        spellings = [spelling(job.tokenizer, token) for token, _ in [*start, *each]]
        offsets = []
        for text in spellings:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": spellings,
            "token_logprobs": [one and one.logprob for _, one in [*start, *each]],
            "top_logprobs": [
                None if one is None else _top(job.tokenizer, token, one) for token, one in [*start, *each]
            ],
            "text_offset": offsets,
        }


def joined(updates: Iterable[Update]) -> Update:
    """Return all updates of a text as one."""
    updates = list(updates)
    return Update(
        text="".join(update.text for update in updates),
        tokens=tuple(token for update in updates for token in update.tokens),
        finish_reason=updates[-1].finish_reason,
        error=updates[-1].error,
    )


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of one token; a special one has its name."""
    return tokenizer.decode([token]) or tokenizer.id_to_token(token) or ""


def _top(tokenizer: Tokenizer, token: int, logprobs: Logprobs) -> dict[str, float]:
    """Return the likeliest tokens and the one that was taken; of equal spellings the likelier counts."""
    found: dict[str, float] = {}
    for other, logprob in logprobs.top:
        found.setdefault(spelling(tokenizer, other), logprob)
    found.setdefault(spelling(tokenizer, token), logprobs.logprob)
    return found


def _chat_logprobs(tokenizer: Tokenizer, token: int, logprobs: Logprobs | None) -> Json:
    assert logprobs is not None
    top = [_token_logprob(tokenizer, *one) for one in logprobs.top]
    return {**_token_logprob(tokenizer, token, logprobs.logprob), "top_logprobs": top}


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    text = spelling(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
