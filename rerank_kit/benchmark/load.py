"""The load of a benchmark: calls, and the loops and processes that send them."""

import asyncio
import contextlib
import itertools
import json
import math
import multiprocessing
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import aiohttp

# --- one call ---


@dataclass(slots=True)
class Call:
    """One call; times are time.perf_counter() seconds, the same clock in all processes of a host (Linux)."""

    due: float  # when it should have been sent; closed loop: when it was
    sent: float
    end: float
    error: str | None  # None = a good answer
    tokens: int  # prompt tokens counted by the server, 0 = not reported
    pairs: int
    measured: bool


def answer_fault(endpoint: str, data: bytes, n_docs: int) -> tuple[str | None, int]:
    """What is wrong with an answer (None = nothing), and the prompt tokens the server counted (0 = not told)."""
    items, name = ("results", "relevance_score") if endpoint == "rerank" else ("data", "score")
    try:
        answer = json.loads(data)
        indices = [item["index"] for item in answer[items]]
        scores = [item[name] for item in answer[items]]
        usage = answer.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0)
        if any(type(i) is not int for i in indices) or sorted(indices) != list(range(n_docs)):
            return f"indices {str(indices)[:100]}, expected each of 0..{n_docs - 1} once", 0
        if not all(type(s) in (int, float) and math.isfinite(s) for s in scores):
            return f"a score is not a finite number: {str(scores)[:100]}", 0
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        return f"no {items} with index and {name}: {exc!r}: {data[:100]!r}", 0
    return None, tokens


class Bench:
    """What all levels share: session, texts, the number of the next call, the first text of each error."""

    def __init__(
        self,
        base_url: str,
        model: str,
        texts: Any = None,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        connect_timeout_s: float = 5.0,
    ):
        self.addresses, self.model, self.texts = base_url, model, texts
        self.base_urls = [url.strip().rstrip("/") for url in base_url.split(",")]
        self.base_url = self.base_urls[0]
        self.in_flight = dict.fromkeys(self.base_urls, 0)  # calls by address; the last used is the last key
        self.api_key, self.timeout_s, self.connect_timeout_s = api_key, timeout_s, connect_timeout_s
        self.first = 0  # number of the first call of the next level
        self.error_texts: dict[str, str] = {}
        self.answered = 0  # pairs with a good answer so far
        self.checked = False
        self.server_pids: dict[int, bool] = {}  # {PID: is it an API process}, where the server is on this host

    async def __aenter__(self) -> "Bench":
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        timeout = aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=self.connect_timeout_s)
        # limit=0: never wait for a connection. The server closes one that is idle for 5 s (uvicorn): drop it before.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        self.session = aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)
        return self

    async def __aexit__(self, *exc) -> None:
        await self.session.close()

    def twin(self) -> "Bench":
        """A copy for another process, without session and results."""
        twin = Bench(self.addresses, self.model, self.texts, self.api_key, self.timeout_s, self.connect_timeout_s)
        twin.first = self.first
        return twin

    def body(self, endpoint: str, k: int) -> tuple[bytes, int]:
        """Body of the level's call k, and how many documents it has."""
        return self.texts.body(endpoint, self.model, self.first + k)

    async def call(
        self, endpoint: str, body: bytes, n_docs: int, due: float | None = None, measured: bool = True
    ) -> Call:
        """Send one call and judge its answer. Never raises for what the server or the network does."""
        sent = time.perf_counter()
        end, error, text, tokens = None, None, None, 0
        url = min(self.in_flight, key=self.in_flight.__getitem__)
        self.in_flight[url] = self.in_flight.pop(url) + 1
        try:
            async with self.session.post(f"{url}/{endpoint}", data=body, allow_redirects=False) as answer:
                data = await answer.read()
            end = time.perf_counter()
            if answer.status == 200:
                text, tokens = answer_fault(endpoint, data, n_docs)
                error = text and "bad_answer"
            else:
                error, text = f"http_{answer.status}", data.decode(errors="replace")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            error, text = "connect", str(exc)
        except TimeoutError:
            error, text = "timeout", f"no answer in {self.timeout_s:g} s"
        except aiohttp.ClientResponseError as exc:  # not HTTP; its repr() would show our headers, the key among them
            error, text = "bad_answer", exc.message
        except (aiohttp.ClientError, OSError) as exc:
            error, text = "disconnect", f"{type(exc).__name__}: {exc}"
        finally:
            self.in_flight[url] -= 1
        if error:
            self.note_error(error, text or "")
        else:
            self.answered += n_docs
        return Call(sent if due is None else due, sent, end or time.perf_counter(), error, tokens, n_docs, measured)

    def note_error(self, error: str, text: str) -> None:
        """Keep and show the first text of each error."""
        if error not in self.error_texts:
            self.error_texts[error] = " ".join(text.split())[:300]
            if self.checked:
                say(f"[ERR] first {error}: {self.error_texts[error]}")


def say(text: str, live: bool = False) -> None:
    """Progress on stderr. On a terminal the next text overwrites a live one; elsewhere live ones are left out."""
    tty = sys.stderr.isatty()
    if live and not tty:
        return
    print(f"\r\033[K{text}" if tty else text, end="" if tty and live else "\n", file=sys.stderr, flush=True)


# --- one level ---


@dataclass
class Level:
    """One row to be: how many calls, which were made, when the window opened and closed."""

    endpoint: str
    mode: str  # closed | open
    level: float  # calls in flight | calls/s
    warmup: int  # calls before the window
    requests: int | None  # calls in the window
    seconds: float | None  # or: length of the window
    constant: bool = False  # open loop: constant arrivals instead of Poisson
    run: int = 1  # which repetition
    processes: int = 1  # of the client
    slo_ms: float | None = None  # count the calls that miss it
    calls: list[Call] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)  # how late the client itself was
    opened: float | None = None
    closed: float | None = None
    cpu: float = 0.0  # of the busiest client process inside the window, in cores
    interrupted: bool = False

    def full(self, n: int, now: float, opened: float) -> bool:
        """True if no call is to be sent (open loop: due) at `now` after n. opened: start of the window, 0 = not yet."""
        if not opened:
            return False
        return now >= opened + self.seconds if self.seconds else n >= self.warmup + (self.requests or 0)

    def left_s(self, gate: "Gate", now: float) -> float | None:
        """Seconds until no further call is sent; None = not known yet."""
        opened = gate.n[OPENED]
        if not opened or now <= opened:
            return None
        if self.seconds:
            return max(0.0, opened + self.seconds - now)
        taken, wanted = gate.n[TAKEN] - self.warmup, self.requests or 0
        return max(0.0, (wanted - taken) * (now - opened) / taken) if taken > 0 else None

    def __str__(self) -> str:
        return f"{self.endpoint} {self.mode} {self.level:g}"


TAKEN, READY, STARTED, OPENED, CLOSED, STOP = range(6)


class Gate:
    """Which call of a level comes next, and when the window opens and closes: one for all client processes.

    Its numbers: calls taken, processes ready; then times, 0 = not yet: started, window opened, window closed;
    stop: 1 = end now.
    """

    def __init__(self, processes: int = 1):
        context = multiprocessing.get_context("spawn") if processes > 1 else None
        self.processes = processes
        self.n = context.Array("d", 6, lock=False) if context else [0.0] * 6
        self.lock = context.Lock() if context else contextlib.nullcontext()

    async def start(self) -> float:
        """When the level starts: as soon as every process is ready."""
        with self.lock:
            self.n[READY] += 1
            if self.n[READY] == self.processes:
                self.n[STARTED] = time.perf_counter() + 0.05 * (self.processes > 1)
        while not self.n[STARTED]:
            await asyncio.sleep(0.005)
        return self.n[STARTED]

    def take(self, level: Level) -> tuple[int, bool] | None:
        """Closed loop: (number of the next call, is it inside the window), or None = the level has no more."""
        with self.lock:
            taken, now = int(self.n[TAKEN]), time.perf_counter()
            if self.n[CLOSED] or level.full(taken, now, self.n[OPENED]):
                self.n[CLOSED] = self.n[CLOSED] or now
                return None
            # The warm-up takes at most --seconds, also if the server is too slow to finish it.
            late = level.seconds and now - self.n[STARTED] > level.seconds
            if not self.n[OPENED] and (taken == level.warmup or late):
                self.n[OPENED] = now
            self.n[TAKEN] = taken + 1
            return taken, self.n[OPENED] > 0


async def drive_closed(bench: Bench, level: Level, gate: Gate, share: int = 0) -> None:
    """This process's share of N workers, each with one call in flight."""
    start = await gate.start()
    await asyncio.sleep(max(0.0, start - time.perf_counter()))

    async def worker() -> None:
        while (taken := gate.take(level)) is not None:
            k, measured = taken
            level.calls.append(await bench.call(level.endpoint, *bench.body(level.endpoint, k), None, measured))

    async with asyncio.TaskGroup() as group:
        for _ in range(share, int(level.level), gate.processes):
            group.create_task(worker())


async def drive_open(bench: Bench, level: Level, gate: Gate, share: int = 0) -> None:
    """Calls due at level.level a second, with Poisson or constant arrivals, whether or not earlier ones are answered.

    Each process knows the whole schedule and sends every gate.processes-th call of it.
    """

    async def one(body: bytes, n_docs: int, due: float, measured: bool) -> None:
        call = await bench.call(level.endpoint, body, n_docs, due, measured)
        level.lags_s.append(call.sent - due)
        level.calls.append(call)

    rng = random.Random(f"{bench.texts.seed} {level.level} {level.run}")
    due, opened = await gate.start() + 0.05, 0.0
    async with asyncio.TaskGroup() as group:
        for k in itertools.count():
            if level.full(k, due, opened):
                break
            opened = opened or (due if k == level.warmup else 0.0)
            if k % gate.processes == share:
                body, n_docs = bench.body(level.endpoint, k)
                # Also when late, since sleep(0) lets the loop read answers.
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                gate.n[OPENED] = opened
                group.create_task(one(body, n_docs, due, opened > 0))
            due += 1 / level.level if level.constant else rng.expovariate(level.level)
        gate.n[OPENED], gate.n[TAKEN] = opened, k
        gate.n[CLOSED] = opened + level.seconds if level.seconds else due


async def watch(level: Level, gate: Gate, drive: asyncio.Task) -> None:
    """Measure how late the event loop wakes up and what CPU it takes inside the window; show progress."""
    shown, every_s, used = time.perf_counter(), 0.5 if sys.stderr.isatty() else 10.0, None
    parent = multiprocessing.parent_process()
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.02)
        now, cpu = time.perf_counter(), time.process_time()
        if gate.n[STARTED]:  # until then other client processes are still starting, on the same cores
            level.lags_s.append(now - before - 0.02)
        if gate.n[STOP] or (parent and not parent.is_alive()):
            drive.cancel()
        if used is None and gate.n[OPENED]:
            used = (now, cpu)
        elif used and not (gate.n[CLOSED] and now > gate.n[CLOSED]):
            level.cpu = (cpu - used[1]) / (now - used[0])
        if now - shown >= every_s and not parent:
            shown, errors = now, sum(c.error is not None for c in level.calls)
            left = f", {left_s:.0f} s left" if (left_s := level.left_s(gate, now)) is not None else ""
            say(f"{level}: {len(level.calls)} calls answered, {errors} errors{left}", live=True)


async def drive(bench: Bench, level: Level, gate: Gate, share: int = 0) -> None:
    """Make this process's share of a level. Ctrl-C, or the gate's stop, ends it early with what was measured."""
    load = asyncio.create_task((drive_closed if level.mode == "closed" else drive_open)(bench, level, gate, share))
    watcher = asyncio.create_task(watch(level, gate, load))
    try:
        await load
    except asyncio.CancelledError:
        level.interrupted = True
        gate.n[CLOSED] = min(gate.n[CLOSED] or math.inf, time.perf_counter())
    finally:
        watcher.cancel()
    level.opened, level.closed = gate.n[OPENED] or None, gate.n[CLOSED] or None


# --- several client processes ---


def client_process(bench: Bench, level: Level, gate: Gate, share: int, pipe) -> None:
    """Body of one client process: makes its share and sends the level and the error texts back."""

    async def main() -> None:
        async with bench:
            await drive(bench, level, gate, share)

    asyncio.run(main())
    pipe.send((level, bench.error_texts))


def collect(pipes: list, gate: Gate) -> list[tuple[Level, dict] | None]:
    """What each client process sends back; None = it died, which stops the others."""
    parts: list[tuple[Level, dict] | None] = []
    waiting = list(pipes)
    while waiting:
        pipe: Any
        for pipe in wait(waiting):
            waiting.remove(pipe)
            try:
                parts.append(pipe.recv())
            except EOFError:
                parts.append(None)
                gate.n[STOP] = 1
    return parts


async def drive_processes(bench: Bench, level: Level, gate: Gate) -> None:
    """Make a level with gate.processes processes. All calls come into one list, so percentiles stay exact.

    Raises:
        RuntimeError: a client process died.
    """
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    # Ctrl-C reaches all processes of a terminal. New ones inherit the blocked signal; this one tells them to end.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for share in range(gate.processes):
            ours, theirs = context.Pipe(duplex=False)
            args = (bench.twin(), level, gate, share, theirs)
            processes.append(context.Process(target=client_process, args=args, daemon=True))
            processes[-1].start()
            theirs.close()  # the child's copy is then the only one: its death ends the pipe
            pipes.append(ours)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    collecting = asyncio.create_task(asyncio.to_thread(collect, pipes, gate))
    try:
        await asyncio.shield(collecting)
    except asyncio.CancelledError:
        gate.n[STOP] = 1
    found = await collecting
    for process in processes:
        process.join()
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        raise RuntimeError("a client process died; see its error above")
    for part, error_texts in parts:
        level.calls += part.calls
        bench.answered += sum(c.pairs for c in part.calls if c.error is None)
        level.interrupted |= part.interrupted
        for error, text in error_texts.items():
            bench.note_error(error, text)
    # The busiest and the latest process decide whether the client was the bottleneck.
    level.cpu = max(part.cpu for part, _ in parts)
    level.lags_s = max(
        (part.lags_s for part, _ in parts), key=lambda lags: sorted(lags)[int(0.95 * len(lags))] if lags else 0.0
    )
    level.opened, level.closed = gate.n[OPENED] or None, gate.n[CLOSED] or None
