"""A teacher behind an OpenAI-shaped endpoint, which tells the log-probabilities of its k most likely tokens.

    POST URL/completions    prompt: rows of token ids, echo, logprobs: k, max_tokens: 1
    GET  URL/models         its name

What is left of 1 after those k is one bucket (train/objective/buckets.py). vLLM, SGLang and others answer so;
a key in OPENAI_API_KEY is sent along. It is asked for each row once, or once and for all with a cache.

B rows, T positions, N positions of all rows, K tokens.
"""

import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from train.data.batch import Batch
from train.data.module import TextData
from train.data.tokenizer import MIXED_TEXT, TextTokenizer
from train.distill.forms import Records, TopK
from train.objective.positions import Index
from train.objective.teacher import Targets
from train.recipe.sections import LossConfig

TRIES = 3
PAUSE = 1.0
"""Seconds before another try."""
LARGEST_LOG = 1e-3
"""A probability of 1 may be rounded to slightly more."""
NUMBERED = re.compile(r"token_id:(\d+)")


class Endpoint:
    """A server, asked politely: each request is tried a few times.

    Args:
        url: as in `http://localhost:8000/v1`.
        timeout: seconds to wait for a whole answer.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout

    def ask(self, path: str, question: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON answer to a question.

        Raises:
            NestlingError: if there is none after `TRIES` tries, or the server refuses.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not (key.isascii() and key.isprintable()):  # an error of http.client would show the key
                raise NestlingError("OPENAI_API_KEY has characters that no header takes; set it to a key")
            headers["Authorization"] = f"Bearer {key}"
        body = None if question is None else json.dumps(question).encode()
        reason = ""
        for number in range(TRIES):
            if number:
                time.sleep(PAUSE)
            try:
                request = urllib.request.Request(f"{self.url}/{path}", body, headers)
                end = time.monotonic() + self.timeout
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(b"".join(_parts(answer, end)))
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {_first_line(error)}"
                if error.code < 500 and error.code != 429:
                    raise NestlingError(f"loss.teacher={self.url}: refuses ({reason})") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise NestlingError(
            f"loss.teacher={self.url}: does not answer ({reason}); what was made stays: start its server and "
            "give the same command again"
        )

    def complete(self, model: str, prompts: list[list[int]] | list[str], k: int) -> list[dict[str, Any]]:
        """Return the `logprobs` of each prompt and of one more token.

        Raises:
            NestlingError: as `ask`, or if the answer has another shape.
        """
        question = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0}
        more = {"logprobs": k, "echo": True, "return_tokens_as_token_ids": True}
        answer = self.ask("completions", question | more)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found: list[dict[str, Any]] = [choice["logprobs"] for choice in choices]
            if len(found) != len(prompts) or not all(isinstance(one["top_logprobs"], list) for one in found):
                raise KeyError
        except (KeyError, TypeError):
            raise NestlingError(
                f"loss.teacher={self.url}: answers without choices[].logprobs.top_logprobs; serve the model "
                "with completions that take echo and logprobs, as vLLM does"
            ) from None
        return found


class EndpointTeacher:
    """A served teacher, asked for each micro-batch, or for the rows of a cache.

    Args:
        endpoint: the server.
        model: the name that it serves the teacher by.
        form: k, and the width of the vocabulary.
        tokenizer: the run's.
    """

    def __init__(self, endpoint: Endpoint, model: str, form: TopK, tokenizer: TextTokenizer) -> None:
        self.endpoint, self.model, self.form = endpoint, model, form
        self.record = {"path": endpoint.url, "model": model, "sha256": _sha(model)}
        vocabulary = tokenizer.backend.get_vocab()
        self.ids = {tokenizer.backend.decode([number], False): number for number in vocabulary.values()}

    def prepare(self, data: TextData, console: Console | None) -> None:
        """See `Teacher`."""

    def place(self, device: torch.device) -> None:
        """See `Teacher`."""

    def targets(self, batch: Batch) -> Targets:
        """See `Teacher`."""
        return _RecordTargets(self.form, self.records(batch.tokens_BT.cpu()).reshape(-1))

    def records(self, tokens_BT: Tensor, uniform_BT: NDArray[np.float64] | None = None) -> Records:
        """See `Source`.

        Raises:
            NestlingError: if the server does not answer, or tells less than k tokens of a position.
        """
        rows = tokens_BT.tolist()
        answers = self.endpoint.complete(self.model, rows, self.form.k)
        return np.stack([self._row(answer, ids) for answer, ids in zip(answers, rows, strict=True)])

    def _row(self, answer: Mapping[str, Any], ids: list[int]) -> Records:
        shown, told = f"loss.teacher={self.endpoint.url}", answer["top_logprobs"]
        if len(told) != len(ids) + 1:
            raise NestlingError(
                f"{shown}: tells of {len(told)} of {len(ids) + 1} positions; serve the model with "
                "completions that take echo"
            )
        read = numbered_tokens(answer)[:-1]
        if read and None not in read and read != ids:
            raise NestlingError(
                f"{shown}: was asked about tokens {_few(ids)} and tells of {_few(read)}; serve the model "
                "with completions that take token ids as a prompt"
            )
        found = [self._position(position) for position in told[1:]]
        ids_NK = torch.tensor([[token for token, _ in position] for position in found])
        return self.form.pack(ids_NK, torch.tensor([[log for _, log in position] for position in found]))

    def _position(self, told: Any) -> list[tuple[int, float]]:
        """Return the k most likely tokens of a position, and the log-probability of each."""
        items = told.items() if isinstance(told, Mapping) else ()
        known = {
            token: float(log)
            for text, log in items
            if (token := self._token(text)) is not None and _is_log_probability(log)
        }
        most = sorted(known.items(), key=lambda item: -item[1])[: self.form.k]
        if len(most) < self.form.k:
            raise NestlingError(
                f"loss.teacher={self.endpoint.url}: tells {len(most)} tokens of a position, distill.k="
                f"{self.form.k}; set that to {max(len(most), 1)} or let the server tell more (vLLM: "
                "--max-logprobs)"
            )
        return most

    def _token(self, text: str) -> int | None:
        numbered = NUMBERED.fullmatch(text)
        token = int(numbered[1]) if numbered else self.ids.get(text)
        return token if token is not None and token < self.form.vocab_size else None


class _RecordTargets:
    def __init__(self, form: TopK, records_N: Records) -> None:
        self.form, self.records_N = form, records_N

    def divergence(self, here: Index, logits_NV: Tensor, config: LossConfig) -> Tensor:
        """See `Targets`."""
        places = here if isinstance(here, slice) else here.cpu().numpy()
        return self.form.divergence(self.records_N[places], logits_NV, config)


def check_endpoint(endpoint: Endpoint, model: str | None, tokenizer: TextTokenizer) -> str:
    """Return the name of the model that is served; check that it cuts a text as the run's tokenizer does.

    Raises:
        UsageError: if it serves no such model, or another tokenizer.
        NestlingError: if it does not answer.
    """
    shown = f"loss.teacher={endpoint.url}"
    answer = endpoint.ask("models")
    models = answer.get("data") if isinstance(answer, dict) else None
    listed = models if isinstance(models, list) else []
    served = [one["id"] for one in listed if isinstance(one, dict) and "id" in one]
    if not served or (model is not None and model not in served):
        names = ", ".join(map(str, served)) or "nothing"
        raise UsageError(f"{shown}: serves {names}; set distill.model to one of its models")
    name = str(served[0] if model is None else model)
    (told,) = endpoint.complete(name, [MIXED_TEXT], 1)
    theirs = numbered_tokens(told)[:-1]
    ours = tokenizer.backend.encode(MIXED_TEXT).ids
    if None not in theirs:
        same = ours in (theirs, theirs[1:])  # it may put a token in front of a text
    else:
        same = len(theirs) - len(ours) in (0, 1)
    if not same:
        raise UsageError(
            f"{shown}: cuts a text into other tokens than data.tokenizer={tokenizer.name}; set that to the "
            "tokenizer of the model that is served"
        )
    return name


def numbered_tokens(logprobs: Mapping[str, Any]) -> list[int | None]:
    """Return the ids of the tokens that an answer is about; None for one that is told as text.

    >>> numbered_tokens({"tokens": ["token_id:5", " the"]})
    [5, None]
    """
    tokens = logprobs.get("tokens")
    found = [NUMBERED.fullmatch(str(token)) for token in tokens] if isinstance(tokens, list) else []
    return [int(one[1]) if one else None for one in found]


def _parts(answer: http.client.HTTPResponse, end: float) -> Iterator[bytes]:
    """Yield an answer as it comes in, until a time at which it must be whole."""
    while part := answer.read1(2**16):
        yield part
        if time.monotonic() > end:  # a socket's own limit is for each part, and a server may drip
            raise TimeoutError("its answer takes longer than distill.timeout")


def _is_log_probability(value: object) -> bool:
    return isinstance(value, (int, float)) and -math.inf < value < LARGEST_LOG


def _few(ids: Sequence[int | None]) -> str:
    return f"{', '.join(map(str, ids[:4]))}, ..."


def _first_line(error: urllib.error.HTTPError) -> str:
    try:
        told = error.read1(300)  # what has come of it: a server may drip
    except (OSError, http.client.HTTPException):
        told = b""  # the connection breaks within the answer, or nothing of it comes
    return " ".join(told.decode(errors="replace").split()) or error.reason


def _sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
