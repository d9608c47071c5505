"""The load of a benchmark: texts, calls, and the loops and processes that send them (bench_rerank.py)."""

import asyncio
import contextlib
import itertools
import json
import math
import multiprocessing
import random
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import aiohttp

SERIAL_WORDS = 5  # words that number a text: 50 ** 5 texts before one comes again
LONGEST = 32768  # words or tokens of a text
# Common English words, about one token each for the usual tokenizers.
WORDS = re.findall(
    r"\w+",
    """able above across air animal answer area art back bank beach bear bird black board boat body book bread bridge
    brother build camp capital car city clear cloud coast cold color country dance daughter day doctor dollar door
    dream earth east edge engine evening fire fish floor forest friend garden""",
)


# --- texts ---


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in words or tokens: `128`, `64-512` (uniform), `lognormal:200,0.8` (mean, sigma of the log)."""

    spec: str
    kind: str
    low: float  # fixed: the length | uniform: the least | lognormal: the mean
    high: float  # uniform: the most | lognormal: sigma

    @classmethod
    def parse(cls, spec: str) -> "Lengths":
        """Raises ValueError for a text that names no distribution, or lengths outside 5..32768."""
        number = r"(\d+(?:\.\d+)?)"
        if found := re.fullmatch(r"(\d+)(?:-(\d+))?", spec):
            kind, low, high = ("uniform" if found[2] else "fixed"), int(found[1]), int(found[2] or found[1])
            wrong = high < low or high > LONGEST
        elif found := re.fullmatch(rf"lognormal:{number},{number}", spec):
            kind, low, high = "lognormal", float(found[1]), float(found[2])
            wrong = low > LONGEST or not 0 < high <= 3
        else:
            raise ValueError(f"{spec!r} is not a length: write 128, 64-512 or lognormal:MEAN,SIGMA")
        if wrong or low < SERIAL_WORDS:
            raise ValueError(f"{spec!r} is out of range: lengths of {SERIAL_WORDS} to {LONGEST}, sigma up to 3")
        return cls(spec, kind, low, high)

    def draw(self, rng: random.Random) -> int:
        """One length; a lognormal one is kept within 5..32768."""
        if self.kind == "lognormal":
            # exp(mu + sigma**2 / 2) is the mean of a lognormal distribution.
            drawn = round(rng.lognormvariate(math.log(self.low) - self.high**2 / 2, self.high))
            return min(max(drawn, SERIAL_WORDS), LONGEST)
        return rng.randint(self.low, self.high) if self.kind == "uniform" else self.low

    @property
    def most(self) -> int:
        return LONGEST if self.kind == "lognormal" else self.high


class Texts:
    """Queries and documents from a seed: call k always gets the same texts, and no two calls share one.

    Args:
        doc, query: lengths in words.
        repeat: None; "query" = all calls share their query; "all" = query and documents.
        words: to write with; those of one_token_words() make the lengths tokens. None = WORDS.
    """

    lines = None  # how many calls there are before texts come again; None = no end

    def __init__(
        self,
        seed: int,
        n_docs: int,
        doc: str = "100",
        query: str = "10",
        repeat: str | None = None,
        words: list[str] | None = None,
    ):
        rng = random.Random(seed)
        self.seed, self.n_docs, self.repeat = seed, n_docs, repeat
        self.doc, self.query = Lengths.parse(doc), Lengths.parse(query)
        self.words = rng.sample(words or WORDS, len(words or WORDS))
        self.ring = rng.choices(words or WORDS, k=20_000 + max(self.doc.most, self.query.most))
        unit = "tokens" if words else "words"
        again = {None: "new for each call", "query": "one query for all calls", "all": "the same for all calls"}
        self.about = f"{n_docs} documents of {doc} {unit} a call, query of {query} {unit}, {again[repeat]}"

    def _text(self, serial: int, lengths: Lengths, rng: random.Random) -> str:
        # The serial number comes first, lowest digit first: texts differ from their first tokens on, and
        # the prefix cache finds nothing. Slices of ready text keep this cheap beside the calls in flight.
        opening = []
        for _ in range(SERIAL_WORDS):
            serial, digit = divmod(serial, len(self.words))
            opening.append(self.words[digit])
        n_words, at = lengths.draw(rng), rng.randrange(20_000)
        return " ".join(opening + self.ring[at : at + n_words - SERIAL_WORDS])

    def of_call(self, k: int) -> tuple[str, list[str]]:
        """Query and n_docs documents of call k."""
        q, d = (0 if self.repeat else k), (0 if self.repeat == "all" else k)
        query = self._text(q, self.query, random.Random(f"{self.seed} query {q}"))
        rng = random.Random(f"{self.seed} documents {d}")
        return query, [self._text(d * self.n_docs + i, self.doc, rng) for i in range(self.n_docs)]

    def body(self, endpoint: str, model: str, k: int) -> tuple[bytes, int]:
        """JSON body of call k, and how many documents it has."""
        return json_body(endpoint, model, *self.of_call(k)), self.n_docs


class FileTexts:
    """Calls from a JSONL file of {"query": "...", "documents": ["...", ...]}, in an order from the seed.

    A line's "instruction" is sent with it. After the last line the first comes again: the prefix cache knows it.

    Raises:
        ValueError: a line that is no such object, with its number; no line at all. OSError: no such file.
    """

    def __init__(self, path: str, seed: int):
        self.calls = []
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                one = json.loads(line)
                query, documents, instruction = one["query"], one["documents"], one.get("instruction")
                texts = [query, *documents, *([] if instruction is None else [instruction])]
                if type(documents) is not list or not documents or not all(type(t) is str for t in texts):
                    raise TypeError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{path} line {number} is not {{"query": "...", "documents": ["...", ...]}}') from None
            self.calls.append((query, documents, instruction))
        if not self.calls:
            raise ValueError(f"{path} has no lines")
        random.Random(seed).shuffle(self.calls)
        self.seed, self.lines = seed, len(self.calls)
        self.about = f"{path}: {self.lines} calls of {sum(len(c[1]) for c in self.calls) / self.lines:.1f} documents"

    def body(self, endpoint: str, model: str, k: int) -> tuple[bytes, int]:
        """JSON body of call k, and how many documents it has."""
        query, documents, instruction = self.calls[k % self.lines]
        return json_body(endpoint, model, query, documents, instruction), len(documents)


def json_body(endpoint: str, model: str, query: str, documents: list[str], instruction: str | None = None) -> bytes:
    # text_1 / text_2: the spelling of the Score API that every vLLM knows.
    names = ("query", "documents") if endpoint == "rerank" else ("text_1", "text_2")
    more = {} if instruction is None else {"instruction": instruction}
    return json.dumps({"model": model, names[0]: query, names[1]: documents, **more}).encode()


def one_token_words(folder: str) -> list[str]:
    """Words of which each is one token of the tokenizer in `folder`, first in a text or after a space.

    Raises:
        ValueError: no tokenizer.json, the package `tokenizers` is missing, or fewer than 20 such words.
    """
    try:
        from tokenizers import Tokenizer  # comes with vLLM; needed for lengths in tokens only

        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        tokenizer.no_truncation()  # both may be set in the file
        tokenizer.no_padding()
    except ImportError:
        raise ValueError("lengths in tokens need the package tokenizers: pip install tokenizers") from None
    except Exception as exc:  # tokenizers raises bare Exception
        raise ValueError(f"no tokenizer in {folder}: {exc}") from None

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    words = [w for w in WORDS if tokens(w) == 1 and tokens(f"{w} {w} {w}") == 3]
    joined = random.Random(0).choices(words, k=1000) if words else []
    if len(words) < 20 or tokens(" ".join(joined)) != 1000:
        raise ValueError(f"the tokenizer in {folder} has too few English words as one token: use lengths in words")
    return words


# --- one call ---


@dataclass(slots=True)
class Call:
    """One call; times are time.perf_counter() seconds, the same clock in all processes of a host (Linux)."""

    due: float  # when it should have been sent; closed loop: when it was
    sent: float
    end: float
    error: str | None  # None = a good answer
    tokens: int  # prompt tokens by the server's count, 0 = not told
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

    def __init__(self, base_url, model, texts=None, api_key=None, timeout_s=120.0, connect_timeout_s=5.0):
        self.addresses, self.model, self.texts = base_url, model, texts
        self.base_urls = [url.strip().rstrip("/") for url in base_url.split(",")]
        self.base_url = self.base_urls[0]
        self.in_flight = dict.fromkeys(self.base_urls, 0)  # calls by address; the one used last stands last
        self.api_key, self.timeout_s, self.connect_timeout_s = api_key, timeout_s, connect_timeout_s
        self.first = 0  # number of the first call of the next level
        self.error_texts: dict[str, str] = {}
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
        """The same for another process: no session, nothing found yet."""
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
        url = min(self.in_flight, key=self.in_flight.get)
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
            self.note_error(error, text)
        return Call(sent if due is None else due, sent, end or time.perf_counter(), error, tokens, n_docs, measured)

    def note_error(self, error: str, text: str) -> None:
        """Keep and show the first text of each error."""
        if error not in self.error_texts:
            self.error_texts[error] = " ".join(text.split())[:300]
            if self.checked:
                say(f"[ERR] first {error}: {self.error_texts[error]}")


def say(text: str, live: bool = False) -> None:
    """Progress on stderr. On a terminal the next text overwrites a live one; elsewhere all are plain lines."""
    tty = sys.stderr.isatty()
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
    constant: bool = False  # open loop: even distances, not Poisson
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
        """After n calls, none is to be sent (open loop: due) at `now`; opened: the window's start, 0 = not yet."""
        if not opened:
            return False
        return now >= opened + self.seconds if self.seconds else n >= self.warmup + self.requests

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
            # A server too slow for its warm-up in --seconds gets no longer for it.
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
    """Calls due at level.level a second, at random (Poisson) or even distances, answered or not.

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
                # Also when late: sleep(0) lets answers in.
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
            say(f"{level}: {len(level.calls)} calls answered, {errors} errors", live=True)


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
    parts, waiting = [], list(pipes)
    while waiting:
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
    parts = await collecting
    for process in processes:
        process.join()
    if None in parts:
        raise RuntimeError("a client process died; see its error above")
    for part, error_texts in parts:
        level.calls += part.calls
        level.interrupted |= part.interrupted
        for error, text in error_texts.items():
            bench.note_error(error, text)
    # The busiest and the latest process tell whether the client was the limit.
    level.cpu = max(part.cpu for part, _ in parts)
    level.lags_s = max(
        (part.lags_s for part, _ in parts), key=lambda lags: sorted(lags)[int(0.95 * len(lags))] if lags else 0.0
    )
    level.opened, level.closed = gate.n[OPENED] or None, gate.n[CLOSED] or None
