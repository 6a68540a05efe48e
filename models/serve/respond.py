"""A response from the updates of its jobs: whole, or as server-sent events.

A client that goes away cancels its jobs, wherever they are.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from models.serve.answers import Answer, Json, error_body, joined
from models.serve.errors import JsonResponse, message_of
from models.serve.job import Job, Update
from models.serve.schema import SamplingBody
from models.serve.worker import Worker


async def respond(worker: Worker, answer: Answer, body: SamplingBody, request: Request) -> Response:
    """Queue an answer's jobs, and return its response: whole, or a stream of events.

    Raises:
        Busy: if the queue has no room.
        Exception: what went wrong in a text.
    """
    worker.submit(answer.jobs)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _Stream(worker, answer, _events(answer, usage))
    watch = asyncio.create_task(_until_gone(request))
    work = asyncio.create_task(_all_updates(answer.jobs))
    try:
        await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        updates = work.result()
    finally:
        watch.cancel()
        if not work.done():
            work.cancel()
            worker.cancel(answer.jobs)
    error = next((update.error for update in updates if update.error is not None), None)
    if error is not None:
        raise error
    return JsonResponse(answer.whole(updates))


class _Stream(StreamingResponse):
    """Server-sent events; however they end, so do the jobs."""

    def __init__(self, worker: Worker, answer: Answer, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._worker, self._jobs = worker, answer.jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._jobs)


async def _events(answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    for chunk in answer.first_chunks():
        yield _event(chunk)
    going = len(answer.jobs)
    while going:
        for index, update in await _next_updates(answer.jobs):
            going -= update.is_last
            if update.error is not None:
                yield _event(error_body(message_of(update.error), kind="server_error"))
                return
            yield _event(answer.chunk(index, update))
    if with_usage:
        yield _event(answer.usage_chunk())
    yield b"data: [DONE]\n\n"


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


async def _next_updates(jobs: Sequence[Job]) -> list[tuple[int, Update]]:
    """Wait for news; return all that is there, one update for each choice."""
    queue = jobs[0].updates
    found: dict[int, list[Update]] = {}
    index, update = await queue.get()
    found[index] = [update]
    while not queue.empty():
        index, update = queue.get_nowait()
        found.setdefault(index, []).append(update)
    return [(index, joined(updates)) for index, updates in found.items()]


async def _all_updates(jobs: Sequence[Job]) -> list[Update]:
    """Return one update for each job, once all are at their end or one has failed."""
    found: list[list[Update]] = [[] for _ in jobs]
    going = len(jobs)
    while going:
        for index, update in await _next_updates(jobs):
            found[index].append(update)
            going -= update.is_last
            if update.error is not None:
                return [update]
    return [joined(updates) for updates in found]


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
