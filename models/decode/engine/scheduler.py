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
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from models.elastic.cache import KVCache
from models.elastic.request import Request
from models.elastic.view import Scorer
from models.kernels.sample import Draws

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


Steps: TypeAlias = Generator[Pass, Tensor, Result]
"""A coroutine: yields passes, receives their rows (see `run`), and returns a result."""

Events: TypeAlias = Generator[Pass | list[Event], Tensor | None, None]
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


class BatchScheduler(Iterator[tuple[int, Event]]):
    """Run many requests' passes in batches; gives (number of the request, what it emitted).

    Passes through any model but the target's go first, so that the target scores the drafts of all.

    Args:
        requests: steps of each request.
        target: the target of all requests.
    """

    def __init__(self, requests: Sequence[Events[Event]], target: Scorer) -> None:
        self._requests = list(requests)
        self._target = target.key
        self._waiting: dict[int, Pass] = {}
        self._events = self._run()

    def __next__(self) -> tuple[int, Event]:
        """Return the next event of any request."""
        return next(self._events)

    def cancel(self, number: int) -> None:
        """End a request; the others go on."""
        self._requests[number].close()
        self._waiting.pop(number, None)

    def _run(self) -> Iterator[tuple[int, Event]]:
        for number in range(len(self._requests)):
            yield from self._advance(number, None)
        while self._waiting:
            group = _next_group(self._waiting, self._target)
            with torch.inference_mode():
                logits = run([self._waiting.pop(number) for number in group])
            for number, logits_TV in zip(group, logits, strict=True):
                yield from self._advance(number, logits_TV)

    def _advance(self, number: int, logits_TV: Tensor | None) -> Iterator[tuple[int, Event]]:
        """Let a request go on to its next pass."""
        event = _send(self._requests[number], logits_TV)
        while event is not None and not isinstance(event, Pass):
            for one in event:
                yield number, one
            event = _send(self._requests[number], None)
        if isinstance(event, Pass):
            self._waiting[number] = event


def run(passes: Sequence[Pass]) -> list[Tensor]:
    """Make some passes through the same model in one; return the logits [T, V] of each.

    T are the last positions, `num_last` of them, and the drawn tokens but for the last. What a token was
    drawn from is a distribution. Gradients are off where this is called: turning them off once more takes
    time.
    """
    requests = [Request(*one[1:]) for one in passes]
    rows_TV = passes[0].scorer.run(requests)
    return [rows_TV] if len(passes) == 1 else list(rows_TV.split([one.num_rows for one in requests]))


@torch.inference_mode()
def _run_until_emitted(events: Events[Event]) -> list[Event] | None:
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
def _send(events: Events[Event], logits_TV: Tensor | None) -> Pass | list[Event] | None:
    """Go on to the next event; None at the end."""
    try:
        return events.send(logits_TV)
    except StopIteration:
        return None


def _next_group(waiting: Mapping[int, Pass], target: Hashable) -> list[int]:
    """Return requests that wait for one model: for a draft while any do, since the others wait for them."""
    groups: dict[Hashable, list[int]] = {}
    for number, one in waiting.items():
        groups.setdefault(one.scorer.key, []).append(number)
    return max(groups.items(), key=lambda group: (group[0] != target, len(group[1])))[1]
