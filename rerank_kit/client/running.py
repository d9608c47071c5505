"""Sends the requests of calls: one after the other, in threads, or in an event loop."""

import asyncio
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context
from typing import Any, TypeVar

from .. import settings
from .errors import RerankError
from .one_call import First, Items, Ranked, _Call
from .sending import apost, post

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def _run(
    call: _Call, n_threads: int | None = None, stop: threading.Event | None = None
) -> tuple[Items, list[Any], dict[str, Any]]:
    call.start()
    given_up = stop or threading.Event()

    def send(part: range) -> dict[str, Any]:
        reply = post(*call.request(part), given_up)
        if ask := call.other_name(reply):
            with suppress(RerankError):
                call.learn_alias(reply, post(*ask))
        return call.check(part, reply)

    n_tries = 0
    while True:
        n_tries += 1
        answers = _in_threads(send, call.parts, n_threads or settings.CLIENT.client_concurrency, given_up)
        if not call.again(answers, n_tries):
            return call.merge(answers)


def _run_stages(call: _Call, first: First, n_threads: int | None = None, stop: threading.Event | None = None) -> Ranked:
    small, keep = call.stage(first)
    if small is None:
        items, scores, raw = _run(call, n_threads, stop)
        return items, scores, raw | {"_first": None}
    began = time.perf_counter()
    found = _run(small, n_threads, stop)
    kept = sorted(item.index for item in found[0][:keep])
    return call.joined(found, kept, _run(call.only(kept, began), n_threads, stop))


async def _arun_stages(call: _Call, first: First) -> Ranked:
    small, keep = call.stage(first)
    if small is None:
        items, scores, raw = await _arun(call)
        return items, scores, raw | {"_first": None}
    began = time.perf_counter()
    found = await _arun(small)
    kept = sorted(item.index for item in found[0][:keep])
    return call.joined(found, kept, await _arun(call.only(kept, began)))


async def _arun(call: _Call) -> tuple[Items, list[Any], dict[str, Any]]:
    call.start()
    slots = asyncio.Semaphore(settings.CLIENT.client_concurrency)

    async def send(part: range) -> dict[str, Any]:
        async with slots:
            reply = await apost(*call.request(part))
            if ask := call.other_name(reply):
                with suppress(RerankError):
                    call.learn_alias(reply, await apost(*ask))
            return call.check(part, reply)

    if len(call.parts) <= 1:
        return call.merge([await send(part) for part in call.parts])
    n_tries = 0
    while True:
        n_tries += 1
        tasks = [asyncio.ensure_future(send(part)) for part in call.parts]
        try:
            answers = await asyncio.gather(*tasks)
        finally:  # after a failure no part may go on in the background
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not call.again(answers, n_tries):
            return call.merge(answers)


def _in_threads(
    work: Callable[[_Job], _Result],
    jobs: list[_Job],
    n_threads: int,
    stop: threading.Event,
    tick: Callable[[], None] = lambda: None,
) -> list[_Result]:
    """[work(job) for job in jobs] in up to n_threads threads.

    The first failure sets stop and drops the jobs that have not started. It is raised when the requests in flight have
    ended. Ctrl-C is raised at once, and the process may end before they have.
    """
    if len(jobs) <= 1 or n_threads == 1:  # the usual call needs no thread
        results = []
        for job in jobs:
            results.append(work(job))
            tick()
        return results
    # Daemon threads: the interpreter joins those of a ThreadPoolExecutor at its end, so Ctrl-C would wait for answers
    # in flight. Each job runs in a copy of the caller's context, which holds the OpenTelemetry span.
    todo: queue.SimpleQueue[tuple[int, _Job, Context]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, _Result | None, BaseException | None]] = queue.SimpleQueue()
    for number, job in enumerate(jobs):
        todo.put((number, job, copy_context()))

    def run() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                number, job, context = todo.get_nowait()
                try:
                    done.put((number, context.run(work, job), None))
                except BaseException as exc:
                    done.put((number, None, exc))

    threads = [threading.Thread(target=run, name=f"rerank_{i}", daemon=True) for i in range(min(n_threads, len(jobs)))]
    for thread in threads:
        thread.start()
    by_number: dict[int, Any] = {}
    try:
        while len(by_number) < len(jobs):
            number, result, error = done.get()
            if error:
                raise error
            by_number[number] = result
            tick()
    except BaseException as exc:
        stop.set()
        for thread in threads if isinstance(exc, Exception) else ():
            thread.join()
        raise
    return [by_number[number] for number in range(len(jobs))]


@contextmanager
def _counter(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """Yields a function that counts one more query on stderr."""
    if not show:
        yield lambda: None
        return
    t0, count = time.perf_counter(), itertools.count(1)

    def tick() -> None:
        done = next(count)
        rate = done / max(time.perf_counter() - t0, 1e-9)
        text = f"\r{done}/{total} queries, {rate:.1f}/s, {(total - done) / rate:.0f} s left "
        print(text, end="", file=sys.stderr, flush=True)

    try:
        yield tick
    finally:
        print(file=sys.stderr)
