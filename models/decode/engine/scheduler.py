"""A scheduler of model passes: it runs a request's passes one by one, or those of a batch at once.

A request decodes in steps: a generator that yields every pass it needs, is sent its logits, and yields
each token that it has decided. Who drives it decides how the passes run:

    run_sequentially   at once, one after another
    BatchScheduler     the passes of many requests through the same model become one, in which their
                       tokens share the reading of the weights and nothing else (`models.elastic.cache.Batch`)

So a batch is a way to run requests, not a way to write them: a request in a batch makes the choices
that it makes alone, whatever its companions, their lengths, their drafts and when they end.

T positions, V vocabulary.
"""

from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from models.elastic.cache import KVCache
from models.elastic.request import Request
from models.elastic.view import Scorer
from models.kernels.sample import Draws

LONGEST_ROUND = 32
"""Tokens of a pass that may be a round of drafts; a longer one reads a prompt."""
Result = TypeVar("Result")
Event = TypeVar("Event")


class Pass(NamedTuple):
    """A pass over tokens that follow what a cache has committed."""

    scorer: Scorer
    ids: list[int]
    cache: KVCache
    num_last: int
    """Number of last positions that are scored."""
    draws: Draws | None = None
    """More tokens that the pass draws and, but for the last, reads; only of a model that `can_draw`."""
    is_draft: bool = False
    """True if the tokens that it scores are to be drafted."""


Steps: TypeAlias = Generator[Pass, Tensor, Result]
"""A coroutine: yields passes, receives their rows (see `run`), and returns a result."""

Events: TypeAlias = Generator[Pass | Sequence[Event], Tensor | None, None]
"""A coroutine: yields a Pass and receives its logits, or yields new events and receives None."""


def run_sequentially(events: Events[Event]) -> Iterator[Event]:
    """Run each pass at once; yield the events between them."""
    while (emitted := _run_until_emitted(events)) is not None:
        yield from emitted


def run_steps(steps: Steps[Result]) -> Result:
    """Run steps to their end, each pass at once, and give their result."""
    with torch.inference_mode():
        try:
            one = next(steps)
            while True:
                one = steps.send(run([one])[0])
        except StopIteration as end:
            result: Result = end.value
            return result


class BatchScheduler(Generic[Event]):
    """Runs many requests' passes in batches; requests may join and leave between any two passes.

    Passes that draft go first, so that the target scores the drafts of all.

    Args:
        prompt_tokens: the most tokens of prompts in a pass that others share, unless one request has more;
            None sets no limit.
    """

    def __init__(self, prompt_tokens: int | None = None) -> None:
        self._prompt_tokens = prompt_tokens
        self._requests: dict[int, Events[Event]] = {}
        self._waiting: dict[int, Pass] = {}

    def __len__(self) -> int:
        """Return the number of requests that are not at their end."""
        return len(self._requests)

    def add(self, number: int, request: Events[Event]) -> list[Event]:
        """Let a request join, by a number of its own; return what it emits before its first pass."""
        self._requests[number] = request
        return self._advance(number, None)

    def cancel(self, number: int) -> None:
        """End a request; the others go on."""
        if (request := self._requests.pop(number, None)) is not None:
            request.close()
        self._waiting.pop(number, None)

    def step(self) -> list[tuple[int, Event]]:
        """Run one pass, of all requests that can share it; return what they emit, with their numbers."""
        group = _next_group(self._waiting, self._prompt_tokens)
        if not group:
            return []
        with torch.inference_mode():
            logits = run([self._waiting.pop(number) for number in group])
        events = []
        for number, logits_TV in zip(group, logits, strict=True):
            events += [(number, event) for event in self._advance(number, logits_TV)]
        return events

    def _advance(self, number: int, logits_TV: Tensor | None) -> list[Event]:
        """Let a request go on to its next pass or its end."""
        events: list[Event] = []
        emitted = _send(self._requests[number], logits_TV)
        while emitted is not None and not isinstance(emitted, Pass):
            events += emitted
            emitted = _send(self._requests[number], None)
        if emitted is None:
            del self._requests[number]
        else:
            self._waiting[number] = emitted
        return events


def run(passes: Sequence[Pass]) -> list[Tensor]:
    """Make some passes through the same model in one; return the logits [T, V] of each.

    T are the last positions, `num_last` of them, and the drawn tokens but for the last. What a token was
    drawn from is a distribution. Gradients are off where this is called: turning them off once more takes
    time.
    """
    requests = [Request(*one[1:5]) for one in passes]
    rows_TV = passes[0].scorer.run(requests)
    return [rows_TV] if len(passes) == 1 else list(rows_TV.split([one.num_rows for one in requests]))


@torch.inference_mode()
def _run_until_emitted(events: Events[Event]) -> Sequence[Event] | None:
    """Run passes until events are emitted; None at the end."""
    logits_TV = None
    try:
        while True:
            event = events.send(logits_TV)
            if not isinstance(event, Pass):
                return event
            logits_TV = run([event])[0]
    except StopIteration:
        return None


@torch.inference_mode()
def _send(events: Events[Event], logits_TV: Tensor | None) -> Pass | Sequence[Event] | None:
    """Go on to the next event; None at the end."""
    try:
        return events.send(logits_TV)
    except StopIteration:
        return None


def _next_group(waiting: Mapping[int, Pass], prompt_tokens: int | None) -> list[int]:
    """Return requests whose passes become the next one.

    Drafts go first, since the target waits for them; among targets the one that has waited longest.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, one in waiting.items():
        groups.setdefault(one.scorer.key, []).append(number)

    def drafts(group: list[int]) -> int:
        return sum(waiting[number].is_draft for number in group)

    group = max(groups.values(), key=drafts, default=[])
    return group if prompt_tokens is None else _few_of_prompts(group, waiting, prompt_tokens)


def _few_of_prompts(group: list[int], waiting: Mapping[int, Pass], prompt_tokens: int) -> list[int]:
    """Leave out what would delay the others: of long passes, those that are not the first few."""
    lengths = {number: len(waiting[number].ids) for number in group}
    kept = [number for number in group if lengths[number] <= LONGEST_ROUND]
    room = prompt_tokens
    for number in (number for number in group if lengths[number] > LONGEST_ROUND):
        if room < prompt_tokens and lengths[number] > room:
            break
        kept.append(number)
        room -= lengths[number]
    return kept
