"""Several engines on one GPU, each in a process of its own, that score the chunks of one run in turn.

One engine process cannot launch the kernels of a small model fast enough for a large GPU. RerankerPool has the methods
of OfflineReranker that score_shards() uses; the processes also tokenize. Results come back in input order.
"""

import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from rerank_kit.engine.plan import Plan
from rerank_kit.models.pair import Pair
from rerank_kit.offline.files import Result
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import ConfigError

CHUNKS_AHEAD = 16  # that a process holds: more pairs than its engine takes ahead (feeding.STEPS_AHEAD)
CHUNKS_OPEN = 2 * CHUNKS_AHEAD  # a process, given out and not yet handed on: what the others do while one is slow
END_S = 20.0  # for a process to end its engine


class Worker:
    """One process with its engine, as the parent sees it.

    vLLM forks its engine, which inherits all descriptors of the process: the pipe and multiprocessing's sentinel stay
    open when the process is killed and the engine lives on. So a thread waits for the process itself.
    """

    def __init__(self, index: int, plan: Plan, make: Callable):
        context = multiprocessing.get_context("spawn")
        self.index, self.n_chunks, self.chunk = index, 0, 0
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, plan, make), name=f"engine-{index}")
        self.process.start()
        theirs.close()
        self._closing = threading.Lock()
        self._watch = threading.Thread(target=self._end_with_process, name=f"watch-{index}", daemon=True)
        self._watch.start()

    def read(self) -> tuple[int, list[Result]] | None:
        """(number of a chunk, its results), or None after the first message.

        Raises:
            ConfigError or RuntimeError: the process failed or died.
        """
        try:
            kind, *rest = self.pipe.recv()
        except (EOFError, OSError):
            self._watch.join(END_S)
            raise RuntimeError(
                f"engine process {self.index} ended with exit code {self.process.exitcode}; its own messages are above"
            ) from None
        if kind == "failed":
            raise (ConfigError if rest[0] == "ConfigError" else RuntimeError)(f"engine process {self.index}: {rest[1]}")
        if kind == "ready":
            self.chunk = rest[0]
            return None
        self.n_chunks -= 1
        return rest[0], rest[1]

    def close_pipe(self) -> None:
        """The end of the process's input, at which it ends its engine."""
        with self._closing:
            self.pipe.close()

    def end(self) -> None:
        """Wait for the process, and end it where it does not end by itself."""
        if self.chunk:  # while it loads, it does not see the end of its input
            self._watch.join(END_S)
        if self._watch.is_alive():
            self.process.terminate()
            self._watch.join(END_S)
        if self._watch.is_alive():
            self.process.kill()
            self._watch.join()
        self.process.join()
        self.process.close()

    def _end_with_process(self) -> None:
        """When the process is dead: end what is left of its group, and the pipe after what it has said."""
        pid = self.process.pid
        assert pid is not None
        with suppress(ChildProcessError):  # WNOWAIT: its number is not given away before its group has ended
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError):  # nothing is left, or it died before it had a group
            os.killpg(pid, signal.SIGKILL)
        with self._closing, suppress(OSError):
            if not self.pipe.closed:
                with socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
                    end.shutdown(socket.SHUT_RDWR)


class RerankerPool:
    """plan.engines processes. Loads the model in each when it is made.

    Args:
        plan: of one engine among plan.engines.
        make: what makes the reranker of a process from the plan; spawn must be able to pickle it.
    """

    def __init__(self, plan: Plan, make: Callable = OfflineReranker):
        self.plan = plan
        self.workers: list[Worker] = []
        self._next = 0  # number of the next chunk, over all runs
        try:
            for index in range(plan.engines):
                self.workers.append(Worker(index, plan, make))
            for worker in self.workers:
                worker.read()
        except BaseException:
            self.close()
            raise
        self.chunk = self.workers[0].chunk

    def prepare(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs as they are: each process tokenizes its own."""
        return pairs

    def stream(self, source: Iterable[tuple[Any, list[Pair]]]) -> Iterator[tuple[Any, list[Result]]]:
        """Results of many lists of pairs, each with the tag that came with it, in their order."""
        lists, more = iter(source), True
        waiting: deque[tuple[int, Any]] = deque()
        done: dict[int, list[Result]] = {}
        most = CHUNKS_OPEN * len(self.workers)
        while True:
            while more and len(waiting) < most:
                worker = min(self.workers, key=lambda one: one.n_chunks)
                if worker.n_chunks >= CHUNKS_AHEAD:
                    break
                tag, pairs = next(lists, (None, None))
                if pairs is None:
                    more = False
                    break
                waiting.append((self._next, tag))
                self._send(worker, pairs)
            if waiting and waiting[0][0] in done:
                number, tag = waiting.popleft()
                yield tag, done.pop(number)
                continue
            if not (waiting or more):
                return
            for worker in self._readable():
                if found := worker.read():
                    done[found[0]] = found[1]  # one of an earlier, interrupted run is never asked for

    def score(self, pairs: list[Pair]) -> list[Result]:
        """Score N pairs; N results in the same order."""
        parts = ((None, pairs[i : i + self.chunk]) for i in range(0, len(pairs), self.chunk))
        return [result for _, results in self.stream(parts) for result in results]

    def close(self) -> None:
        """End the processes: at the end of their input they end their engines."""
        for worker in self.workers:
            worker.close_pipe()
        for worker in self.workers:
            worker.end()
        self.workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _send(self, worker: Worker, pairs: list[Pair]) -> None:
        worker.n_chunks += 1
        number, self._next = self._next, self._next + 1
        try:
            worker.pipe.send((number, pairs))
        except OSError:  # it died; what it said is still to be read
            while True:
                worker.read()

    def _readable(self) -> list[Worker]:
        ready = wait([worker.pipe for worker in self.workers])
        return [worker for worker in self.workers if worker.pipe in ready]


def _work(pipe: Connection, plan: Plan, make: Callable) -> None:
    """A process of the pool: chunks in, results out, until the parent closes the pipe or dies."""
    os.setpgid(0, 0)  # Ctrl-C does not reach it: the parent ends this process, and what it leaves by its group
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as little when all are signalled one by one
    code = 0
    try:
        with make(plan) as reranker:
            pipe.send(("ready", reranker.chunk))
            chunks: queue.Queue = queue.Queue()
            threading.Thread(target=_receive, args=(pipe, reranker, chunks), name="receive", daemon=True).start()
            for number, results in reranker.stream(_arrived(chunks, lambda: reranker.busy)):
                pipe.send(("done", number, results))
    except (BrokenPipeError, ConnectionResetError):  # the parent has gone
        code = 1
    except BaseException as exc:
        code = 1
        try:
            pipe.send(("failed", type(exc).__name__, f"{type(exc).__name__}: {exc}"))
        except OSError:
            print(f"engine process: {type(exc).__name__}: {exc}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # offline.program.leave() says why not sys.exit()


def _receive(pipe: Connection, reranker, chunks: queue.Queue) -> None:
    """Put what arrives into the queue, tokenized. The end of the pipe is a None, an error is itself."""
    try:
        while True:
            number, pairs = pipe.recv()
            chunks.put((number, reranker.prepare(pairs)))
    except (EOFError, OSError):
        chunks.put(None)
    except BaseException as exc:  # raised where the chunks are used
        chunks.put(exc)


def _arrived(chunks: queue.Queue, busy: Callable[[], bool]) -> Iterator:
    """What has arrived. While the engine is busy, a None in place of waiting: it has outputs to fetch."""
    while True:
        try:
            item = chunks.get(block=not busy())
        except queue.Empty:
            yield None
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item
        yield item
