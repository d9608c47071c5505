"""The load of a benchmark: texts from a seed, calls, and the loops that send them (bench_rerank.py)."""

import asyncio
import itertools
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field

import aiohttp

SERIAL_WORDS = 5  # words that number a text: 50 ** 5 texts before one comes again
# Common English words, about one token each for the usual tokenizers.
WORDS = re.findall(
    r"\w+",
    """able above across air animal answer area art back bank beach bear bird black board boat body book bread bridge
    brother build camp capital car city clear cloud coast cold color country dance daughter day doctor dollar door
    dream earth east edge engine evening fire fish floor forest friend garden""",
)


class Texts:
    """Queries and documents from a seed: call k always gets the same texts, and no two calls share one.

    Args:
        repeat: None; "query" = all calls share their query; "all" = query and documents.
    """

    def __init__(self, seed: int, n_docs: int, doc_words: int = 100, query_words: int = 10, repeat: str | None = None):
        rng = random.Random(seed)
        self.seed, self.n_docs, self.repeat = seed, n_docs, repeat
        self.doc_words, self.query_words = doc_words, query_words
        self.words = rng.sample(WORDS, len(WORDS))
        self.ring = rng.choices(WORDS, k=20_000 + doc_words + query_words)

    def _text(self, serial: int, n_words: int, rng: random.Random) -> str:
        # The serial number comes first, lowest digit first: texts differ from their first tokens on, and
        # the prefix cache finds nothing. Slices of ready text keep this cheap beside the calls in flight.
        opening = []
        for _ in range(SERIAL_WORDS):
            serial, digit = divmod(serial, len(self.words))
            opening.append(self.words[digit])
        at = rng.randrange(20_000)
        return " ".join(opening + self.ring[at : at + n_words - SERIAL_WORDS])

    def of_call(self, k: int) -> tuple[str, list[str]]:
        """Query and n_docs documents of call k."""
        q, d = (0 if self.repeat else k), (0 if self.repeat == "all" else k)
        query = self._text(q, self.query_words, random.Random(f"{self.seed} query {q}"))
        rng = random.Random(f"{self.seed} documents {d}")
        return query, [self._text(d * self.n_docs + i, self.doc_words, rng) for i in range(self.n_docs)]

    def body(self, endpoint: str, model: str, k: int) -> bytes:
        """JSON body of call k."""
        query, documents = self.of_call(k)
        # text_1 / text_2: the spelling of the Score API that every vLLM knows.
        names = ("query", "documents") if endpoint == "rerank" else ("text_1", "text_2")
        return json.dumps({"model": model, names[0]: query, names[1]: documents}).encode()


@dataclass(slots=True)
class Call:
    """One call; times are time.perf_counter() seconds."""

    due: float  # when it should have been sent; closed loop: when it was
    sent: float
    end: float
    error: str | None  # None = a good answer
    tokens: int  # prompt tokens by the server's count, 0 = not told
    measured: bool


@dataclass
class Level:
    """One row to be: how many calls, which were made, when the window opened and closed."""

    endpoint: str
    mode: str  # closed | open
    level: float  # calls in flight | calls/s
    warmup: int  # calls before the window
    requests: int | None  # calls in the window
    seconds: float | None  # or: length of the window
    calls: list[Call] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)  # how late the client itself was
    opened: float | None = None
    closed: float | None = None
    cpu: float = 0.0  # of the client inside the window, in cores
    interrupted: bool = False

    def open(self, now: float) -> None:
        self.opened, self._from = now, (time.perf_counter(), time.process_time())

    def close(self, now: float) -> None:
        if self.opened is not None and self.closed is None:
            self.closed = now
            self.cpu = (time.process_time() - self._from[1]) / (time.perf_counter() - self._from[0])

    def complete(self, sent: int, now: float) -> bool:
        """After `sent` calls, none is to be sent (open loop: due) at `now`."""
        if self.opened is None:
            return False
        return now >= self.opened + self.seconds if self.seconds else sent >= self.warmup + self.requests

    def __str__(self) -> str:
        return f"{self.endpoint} {self.mode} {self.level:g}"


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

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str, texts: Texts):
        self.session, self.base_url, self.model, self.texts = session, base_url, model, texts
        self.numbers = itertools.count()
        self.error_texts: dict[str, str] = {}
        self.checked = False

    def next_body(self, endpoint: str) -> bytes:
        return self.texts.body(endpoint, self.model, next(self.numbers))

    async def call(self, endpoint: str, body: bytes, due: float | None = None, measured: bool = True) -> Call:
        """Send one call and judge its answer. Never raises for what the server or the network does."""
        sent = time.perf_counter()
        end, error, text, tokens = None, None, None, 0
        try:
            async with self.session.post(f"{self.base_url}/{endpoint}", data=body, allow_redirects=False) as answer:
                data = await answer.read()
            end = time.perf_counter()
            if answer.status == 200:
                text, tokens = answer_fault(endpoint, data, self.texts.n_docs)
                error = text and "bad_answer"
            else:
                error, text = f"http_{answer.status}", data.decode(errors="replace")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            error, text = "connect", str(exc)
        except TimeoutError:
            error, text = "timeout", f"no answer in {self.session.timeout.total:g} s"
        except aiohttp.ClientResponseError as exc:  # not HTTP; its repr() would show our headers, the key among them
            error, text = "bad_answer", exc.message
        except (aiohttp.ClientError, OSError) as exc:
            error, text = "disconnect", f"{type(exc).__name__}: {exc}"
        if error and error not in self.error_texts:
            self.error_texts[error] = " ".join(text.split())[:300]
            if self.checked:
                say(f"[ERR] first {error}: {self.error_texts[error]}")
        return Call(sent if due is None else due, sent, end or time.perf_counter(), error, tokens, measured)


def say(text: str, live: bool = False) -> None:
    """Progress on stderr. On a terminal the next text overwrites a live one; elsewhere all are plain lines."""
    tty = sys.stderr.isatty()
    print(f"\r\033[K{text}" if tty else text, end="" if tty and live else "\n", file=sys.stderr, flush=True)


async def drive_closed(bench: Bench, level: Level) -> None:
    """N workers, each with one call in flight."""
    sent, started = 0, time.perf_counter()

    async def worker() -> None:
        nonlocal sent
        while True:
            now = time.perf_counter()
            if level.complete(sent, now):
                level.close(now)
                return
            # A server too slow for its warm-up in --seconds gets no longer for it.
            if level.opened is None and (sent == level.warmup or (level.seconds and now - started > level.seconds)):
                level.open(now)
            sent += 1
            body, measured = bench.next_body(level.endpoint), level.opened is not None
            level.calls.append(await bench.call(level.endpoint, body, None, measured))

    async with asyncio.TaskGroup() as group:
        for _ in range(int(level.level)):
            group.create_task(worker())


async def drive_open(bench: Bench, level: Level, constant: bool) -> None:
    """Calls due at level.level a second, at random (Poisson) or even distances, answered or not."""

    async def one(body: bytes, due: float, measured: bool) -> None:
        call = await bench.call(level.endpoint, body, due, measured)
        level.lags_s.append(call.sent - due)
        level.calls.append(call)

    rng = random.Random(f"{bench.texts.seed} {level.level}")
    due = time.perf_counter() + 0.05
    async with asyncio.TaskGroup() as group:
        for sent in itertools.count():
            if level.complete(sent, due):
                break
            body = bench.next_body(level.endpoint)
            # Also when late: sleep(0) lets answers in.
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if sent == level.warmup:
                level.open(due)
            group.create_task(one(body, due, level.opened is not None))
            due += 1 / level.level if constant else rng.expovariate(level.level)
        level.close(level.opened + level.seconds if level.seconds else due)
