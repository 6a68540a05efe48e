"""The worker: one thread in which the model runs, whoever waits for it.

    queue    jobs in the order of their coming; a full queue refuses at once
    admit    between two passes jobs join, as far as the batch and the memory of keys and values have room
    step     one pass of all texts that can share it (models/decode/engine/scheduler.py)
    post     what is new of each text goes to its client's event loop; nobody waits for a slow reader
    tasks    passes of a client who keeps the state itself run beside them (models/serve/verify.py)

A client that has gone is cancelled between two passes. What fails in one text ends that text only.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from models.base.errors import UsageError
from models.decode.engine.engine import decode
from models.decode.engine.request import new_request
from models.decode.engine.scheduler import BatchScheduler, Events, Steps
from models.decode.sampling.rng import SeededRandom
from models.decode.text import TextBuilder
from models.elastic.count import count_kv_bytes
from models.serve.job import Busy, Job, Stopped, Update
from models.serve.live import LiveText
from models.serve.load import Load
from models.serve.metrics import Metrics
from models.serve.prefixes import Prefixes, Text

logger = logging.getLogger(__name__)
Post = Callable[[Sequence[Callable[[], None]]], None]
"""Has calls made in the clients' event loop."""


@dataclass(eq=False, kw_only=True)
class Task:
    """Some passes for a client who keeps a text's state: a prompt to read, or drafts to verify.

    It waits for no room in the batch, since whoever sends it has some already.
    """

    start: Callable[[Prefixes], Steps[Any]]
    """Called in the worker's thread with the texts in memory."""
    done: Callable[[Any], None]
    """Called in the event loop with the result, or the exception."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server."""

    batch: int = 16
    """The most texts that are written at the same time."""
    queue: int = 64
    """The most texts that wait."""
    kv_bytes: int = 2**30
    """Memory of keys and values."""
    prefill_chunk: int = 512
    """The most tokens of prompts that one pass reads, so that a long prompt delays nobody for long."""


class Worker:
    """Writes the texts of jobs in a thread of its own; see the module.

    Args:
        limits: bounds.
        post: hands updates over.
        metrics: counts.
        load: is told how many texts are written.
    """

    def __init__(self, limits: Limits, post: Post, metrics: Metrics, load: Load | None = None) -> None:
        self.limits, self._post, self._metrics, self._load = limits, post, metrics, load
        self._wake = threading.Condition()
        self._queue: deque[Job] = deque()
        self._cancelled: set[Job] = set()
        self._stops = self._is_stuck = False
        self._scheduler = BatchScheduler[Any](limits.prefill_chunk)
        self._new_tasks: deque[Task] = deque()
        self._tasks: dict[int, Task] = {}
        self._prefixes = Prefixes(limits.kv_bytes)
        self._live: dict[int, LiveText] = {}
        self._num_beginning = 0  # taken from the queue, and not live yet
        self._num_jobs = 0
        self._calls: list[Callable[[], None]] = []
        # torch's number of threads is each thread's own
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="nestling-worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End all texts where they are, and the thread."""
        with self._wake:
            self._stops = True
            self._wake.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue some jobs, all or none.

        Raises:
            UsageError: if one has no room even in empty memory, or there are more than an idle server takes.
            Busy: if the queue has no room.
            Stopped: if the server stops.
        """
        for job in jobs:
            self._check_size(job)
        most = self.limits.queue + self.limits.batch
        if len(jobs) > most:
            raise UsageError(
                f"{len(jobs)} texts are asked for (prompts x n), and {most} are the most; ask for fewer"
            )
        with self._wake:
            if self._stops:
                raise Stopped("the server stops; ask another one")
            idle = self.limits.batch - len(self._live) - self._num_beginning
            if len(self._queue) + len(jobs) > self.limits.queue + max(0, idle):
                raise Busy(
                    f"the server is busy: {len(self._queue)} texts wait already; try again later",
                    self._metrics.seconds_to_wait(len(self._queue), self.limits.batch),
                )
            self._queue.extend(jobs)
            self._metrics.queued = len(self._queue)
            self._wake.notify()

    def _check_size(self, job: Job) -> None:
        most = self.limits.kv_bytes // bytes_per_position(job)
        if job.num_positions > most:
            raise UsageError(
                f"--max-tokens: prompt and output have up to {job.num_positions} tokens, but the server's "
                f"memory of keys and values holds {most}; ask for fewer, or start it with more --kv-memory"
            )

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Write these no further; nothing happens to those that are done."""
        with self._wake:
            self._cancelled.update(jobs)
            self._wake.notify()

    def run(self, task: Task) -> None:
        """Begin a task between the next two passes."""
        with self._wake:
            self._new_tasks.append(task)
            self._wake.notify()

    def wake(self) -> None:
        """Look again whether the first text that waits has room: some memory was freed."""
        with self._wake:
            self._is_stuck = False
            self._wake.notify()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        while self._wait():
            try:
                self._admit()
                events = self._scheduler.step()
            except Exception as error:  # a pass that fails is of all its texts; the server goes on
                logger.exception("a pass failed")
                self._fail_all(error)
            else:
                self._take(events)
            self._flush()
        stopped = Stopped("the server stops")
        self._fail_all(stopped)
        self._calls += [partial(job.send, Update(error=stopped)) for job in self._queue]
        self._calls += [partial(task.done, stopped) for task in self._new_tasks]
        self._flush()

    def _fail_all(self, error: Exception) -> None:
        for number in list(self._live):
            self._end(number, Update(error=error))
        for number, task in list(self._tasks.items()):
            self._scheduler.cancel(number)
            self._calls.append(partial(task.done, error))
        self._tasks.clear()

    def _wait(self) -> bool:
        """Wait until there is something to do; drop who has gone; False when all is over."""
        with self._wake:
            self._wake.wait_for(self._has_work)
            gone, self._cancelled = self._cancelled, set()
            if gone:
                stay = deque(job for job in self._queue if job not in gone)
                self._metrics.cancelled += len(self._queue) - len(stay)
                self._queue = stay
                self._is_stuck = False
        for number, live in list(self._live.items()):
            if live.job in gone:
                self._metrics.cancelled += 1
                self._forget(number)
        return not self._stops

    def _has_work(self) -> bool:
        waits = bool(self._queue) and not self._is_stuck
        some = self._live or self._cancelled or self._new_tasks or self._tasks
        return waits or bool(some) or self._stops

    def _admit(self) -> None:
        while self._new_tasks:
            task = self._new_tasks.popleft()
            number, self._num_jobs = self._num_jobs, self._num_jobs + 1
            self._tasks[number] = task
            self._take_task(number, self._scheduler.add(number, _guarded(_as_events(task, self._prefixes))))
        while len(self._live) < self.limits.batch:
            with self._wake:
                if not self._queue:
                    break
                if not self._has_room(self._queue[0]):
                    # sessions of devices have the memory: nothing that runs here will free it
                    self._is_stuck = not self._live and not self._tasks
                    break
                job, self._num_beginning = self._queue.popleft(), 1
            try:
                self._begin(job)
            except Exception as error:  # of this text alone, whose client would wait forever
                self._num_beginning = 0
                logger.exception("a text could not begin")
                self._calls.append(partial(job.send, Update(error=error)))
        self._metrics.queued, self._metrics.running = len(self._queue), len(self._live)
        self._metrics.kv_bytes = self._prefixes.num_bytes
        if self._load is not None:
            self._load.num_live = max(1, len(self._live))

    def _has_room(self, job: Job) -> bool:
        if not job.scores_prompt and self._prefixes.must_wait(job.target.key, job.prompt_ids):
            return False
        return self._prefixes.make_room(job.num_positions * bytes_per_position(job))

    def _begin(self, job: Job) -> None:
        number, self._num_jobs = self._num_jobs, self._num_jobs + 1
        key, cache = job.target.key, job.target.full.new_cache(job.num_positions)
        if not job.scores_prompt:  # they are known of tokens that are read
            job.num_shared = self._prefixes.fill(cache, key, job.prompt_ids)
        request = new_request(
            job.target,
            job.prompt_ids,
            job.new_policy(),
            SeededRandom(job.config.seed, job.row),
            job.config,
            cache=cache,
            prefill_chunk=self.limits.prefill_chunk,
            logprobs=job.logprobs,
            prompt_logprobs=job.prompt_logprobs if job.scores_prompt else None,
        )
        text = Text(key, request.state, len(job.prompt_ids))
        self._prefixes.add(text)
        job.report = request.report
        builder = TextBuilder(job.tokenizer, job.prompt_ids, job.config.stop_texts)
        with self._wake:
            self._live[number], self._num_beginning = LiveText(job, text, builder), 0
        self._metrics.prompt_tokens += len(job.prompt_ids)
        self._metrics.shared_tokens += job.num_shared
        self._scheduler.add(number, _guarded(decode(request)))

    def _take_task(self, number: int, events: Sequence[Any]) -> None:
        for event in events:
            self._calls.append(partial(self._tasks.pop(number).done, event))

    def _take(self, events: Iterable[tuple[int, Any]]) -> None:
        touched = dict.fromkeys(number for number, _ in events if number in self._live)
        for number, event in events:
            if number in self._tasks:
                self._take_task(number, [event])
            live = self._live.get(number)
            if live is not None and not live.ended:
                live.take(event)
        now = perf_counter()
        for number in touched:
            live = self._live[number]
            update = live.update()
            self._metrics.count_tokens(live.job, len(update.tokens), live.last, now)
            live.last = now
            if update.is_last:
                self._end(number, update)
            elif update.text or update.tokens:
                self._calls.append(partial(live.job.send, update))

    def _end(self, number: int, update: Update) -> None:
        job = self._live[number].job
        self._metrics.count_text(job.report, perf_counter() - job.submitted)
        self._calls.append(partial(job.send, update))
        self._forget(number)

    def _forget(self, number: int) -> None:
        self._scheduler.cancel(number)
        self._live.pop(number).text.is_live = False
        self._metrics.running = len(self._live)

    def _flush(self) -> None:
        calls, self._calls = self._calls, []
        if calls:
            self._post(calls)


def _as_events(task: Task, texts: Prefixes) -> Events[Any]:
    """Turn a task's result into its only event."""
    result = yield from task.start(texts)
    yield [result]


def _guarded(events: Events[Any]) -> Events[Any]:
    """Turn what goes wrong in a text into its last event: the others of the batch go on."""
    try:
        yield from events
    except Exception as error:
        logger.debug("a text failed", exc_info=True)
        yield [error]


def bytes_per_position(job: Job) -> int:
    """Return the bytes of keys and values that a token of the text takes."""
    full = job.target.full
    return count_kv_bytes(full.config, num_positions=1, dtype_bytes=full.cache_dtype.itemsize)
