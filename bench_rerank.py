"""Benchmark of the running service: `rerank` and `score` under load.

    python bench_rerank.py                                  # closed loop, 1 to 150 calls in flight
    python bench_rerank.py --endpoint rerank --rate 5,10    # open loop, calls due at random times
    python bench_rerank.py --seconds 20 --json out.json --csv out.csv

How the numbers are made:

* Closed loop: N workers, each sends its next call when it has its answer. Latency runs from sending.
  Open loop: calls are due on a schedule whatever the server does, and latency runs from the moment a
  call was due, so that a stall counts for every call it delays (no coordinated omission).
* The window opens when the first call after the warm-up is sent (open loop: is due). It closes when a
  worker comes for one more call and the level has no more (open loop: when the next call would be due).
  The load is full all the time between, so neither the start nor the end of a level dilutes throughput.
* ok, err and percentiles: the calls that were sent (open loop: due) inside the window, all waited for.
  req/s and pairs/s: good answers that arrived inside the window / its length.
* Percentiles are nearest-rank, over good answers. Retries are off. Every answer is checked.
"""

import argparse
import asyncio
import csv
import datetime
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from env_utils import get_config

# fmt: off
COLUMNS = {"endpoint": 8, "mode": 6, "level": 6, "ok": 6, "err": 5, "req/s": 7, "pairs/s": 8, "p50_ms": 7,
           "p90_ms": 7, "p95_ms": 7, "p99_ms": 7, "max_ms": 7, "errors": 0}  # name: width
# fmt: on
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


def percentile(values: list[float], p: int) -> float | None:
    """Nearest-rank percentile of sorted values; None with fewer than 100 / (100 - p) of them."""
    n = len(values)
    return None if n * (100 - p) < 100 else values[-(-n * p // 100) - 1]


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


async def watch(level: Level) -> None:
    """Measure how late the event loop wakes up, and show progress, until cancelled."""
    shown, every_s = time.perf_counter(), 0.5 if sys.stderr.isatty() else 10.0
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.02)
        now = time.perf_counter()
        level.lags_s.append(now - before - 0.02)
        if now - shown >= every_s:
            shown, errors = now, sum(c.error is not None for c in level.calls)
            say(f"{level}: {len(level.calls)} calls answered, {errors} errors", live=True)


async def run_level(bench: Bench, level: Level, constant: bool = False) -> dict | None:
    """Make one row. Ctrl-C ends it early with what was measured so far; None = nothing was."""
    say(f"{level}: running", live=True)
    watcher = asyncio.create_task(watch(level))
    try:
        await (drive_closed(bench, level) if level.mode == "closed" else drive_open(bench, level, constant))
    except asyncio.CancelledError:
        level.interrupted = True
        level.close(time.perf_counter())
    finally:
        watcher.cancel()
        print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)
    return summarise(level, bench.texts.n_docs) if level.closed is not None else None


def summarise(level: Level, n_docs: int) -> dict:
    """Row of one level: the table's columns by their names, then what explains them."""
    measured = [c for c in level.calls if c.measured]
    good = [c for c in measured if c.error is None]
    errors = Counter(c.error for c in measured if c.error)
    latencies = sorted((c.end - c.due) * 1000 for c in good)
    window_s = level.closed - level.opened
    in_window = sum(c.error is None and level.opened < c.end <= level.closed for c in level.calls)
    req_s = in_window / window_s if window_s > 0 else 0.0
    lags_ms = sorted(s * 1000 for s in level.lags_s)
    # A loop that is very late wakes up too seldom for a percentile: its worst then.
    lag_ms = percentile(lags_ms, 95) or max(lags_ms, default=None)
    tokens = sum(c.tokens for c in good)
    row = {"endpoint": level.endpoint, "mode": level.mode, "level": level.level, "ok": len(good)}
    row |= {"err": errors.total(), "req/s": req_s, "pairs/s": req_s * n_docs}
    row |= {f"p{p}_ms": percentile(latencies, p) for p in (50, 90, 95, 99)}
    row |= {"max_ms": latencies[-1] if latencies else None, "errors": dict(errors)}
    row |= {"window_s": window_s, "ok_in_window": in_window, "warmup": level.warmup}
    row["warmup_err"] = sum(c.error is not None for c in level.calls) - errors.total()
    row |= {"tokens_per_pair": tokens / (len(good) * n_docs) if tokens else None}
    row |= {"client_cpu": level.cpu, "client_lag_ms": lag_ms, "interrupted": level.interrupted}
    # A late client adds its lateness to each latency; below a tenth of p50, or 2 ms, it does not matter.
    late = lag_ms is not None and row["p50_ms"] is not None and lag_ms > max(2.0, 0.1 * row["p50_ms"])
    row["client_limited"] = level.cpu > 0.9 or late
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def doubts(row: dict) -> list[str]:
    """Why not to trust a row; empty = nothing known."""
    out = []
    if row["warmup_err"]:
        out.append(f"{row['warmup_err']} calls of the warm-up failed")
    if (row["p50_ms"] or 0) > 1000 * row["window_s"]:
        out.append(f"p50 is longer than the window of {row['window_s']:.1f} s: give it more --seconds or --requests")
    if row["client_limited"]:
        late = f"{row['client_cpu']:.0%} of one core, {row['client_lag_ms'] or 0:.1f} ms late"
        out.append(f"the client was the bottleneck ({late}); the service may be faster")
    return out


def error_cell(row: dict) -> str:
    """`http_429:3,timeout:1`; `-` = no error."""
    return ",".join([f"{kind}:{n}" for kind, n in row["errors"].items()] + ["interrupted"] * row["interrupted"]) or "-"


def table_line(row: dict) -> str:
    """One line of the table; {name: name} gives its head."""
    cells = []
    for name, width in COLUMNS.items():
        value = "-" if row[name] is None else row[name]
        if isinstance(value, float):
            digits = 0 if value >= 1000 else 1 if value >= 10 else 2
            value = f"{value:g}" if name == "level" else f"{value:.{digits}f}"
        cells.append(f"{value:{'<' if name in ('endpoint', 'mode', 'errors') else '>'}{width}}")
    return "  ".join(cells)


def hardware() -> str:
    """GPUs of this host, else its CPU."""
    try:
        ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        cpu = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else None
        names = [name[1] if name else platform.machine()] * (os.cpu_count() or 1)
    return ", ".join(f"{n} x {name}" for name, n in Counter(names).items())


def is_local(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def without_secrets(words: list[str]) -> str:
    """A command line to show: no API key, no password in a URL."""
    line = re.sub(
        r"(--\S*(api.key|hf.token|secret|password|headers)\S*?)([ =](?!--)\S+)+", r"\1 ***", shlex.join(words)
    )
    return re.sub(r"//[^/@\s]*@", "//***@", line)


def server_flags(base_url: str) -> str | None:
    """Arguments of the `vllm serve` on this host that has base_url's port; None = not found, or another host."""
    port = str(urlsplit(base_url).port or 80)
    for path in Path("/proc").glob("[0-9]*/cmdline") if is_local(base_url) else ():
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:  # ended, or not ours to read
            continue
        flags = words[words.index("serve") + 1 :] if "serve" in words else []
        if f"--port={port}" in flags or ("--port", port) in itertools.pairwise(flags):
            return without_secrets(flags)
    return None


async def ask_server(bench: Bench) -> dict:
    """What the server tells about itself; None = it does not tell."""

    async def get(url: str) -> dict:
        try:
            async with bench.session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return dict(await answer.json(content_type=None)) if answer.status == 200 else {}
        except (aiohttp.ClientError, OSError, ValueError, TypeError):
            return {}

    version = await get(bench.base_url.removesuffix("/v1") + "/version")
    cards = (await get(f"{bench.base_url}/models")).get("data") or [{}]
    card = next((c for c in cards if c.get("id") == bench.model), cards[0])
    return {"vllm": version.get("version"), "model_root": card.get("root"), "max_model_len": card.get("max_model_len")}


async def describe(args: argparse.Namespace, bench: Bench, tokens_per_pair: float | None) -> dict:
    """Everything needed to repeat the run, by name: header of the table and of the JSON file."""
    load = "closed loop, latency from sending"
    if args.rate:
        load = f"open loop, {'constant' if args.constant else 'Poisson'} arrivals, latency from the due time"
    size = f"{args.seconds:g} s" if args.seconds else f"{args.requests or 'at least 100'} calls"
    texts = {None: "new for each call", "query": "one query for all calls", "all": "the same for all calls"}[
        args.repeat
    ]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": without_secrets(["python", "bench_rerank.py", *args.argv]),
        "server": without_secrets([args.base_url]),
        **await ask_server(bench),
        "model": bench.model,
        "server_flags": server_flags(args.base_url),
        "hardware": hardware() + ("" if is_local(args.base_url) else " (this client's; the server is another host)"),
        "client": f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}, retries off",
        "timeout_s": args.timeout_s,
        "load": f"{load}, {size} a level after the warm-up",
        "texts": f"{args.docs} documents of {args.doc_words} words a call, query of {args.query_words} words, {texts}",
        "tokens_per_pair": tokens_per_pair,
        "seed": args.seed,
    }


def write_files(args: argparse.Namespace, about: dict, rows: list[dict]) -> None:
    """--json and --csv, written anew after each level: a long run that dies leaves what it had."""
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(row | {"errors": error_cell(row)} for row in rows)


def levels_of(args: argparse.Namespace) -> list[Level]:
    """The rows to make: per endpoint, per level."""
    out = []
    for endpoint, level in itertools.product(args.endpoint, args.rate or args.concurrency):
        # Warm-up: closed loop one round, open loop about a second.
        warmup = max(5, math.ceil(level)) if args.warmup is None else args.warmup
        requests = args.requests or max(100, math.ceil((10 if args.rate else 3) * level))
        if not args.rate:
            # Whole rounds: of answers that come in waves, a part of a wave would take no time.
            requests = math.ceil(requests / level) * level
        out.append(Level(endpoint, "open" if args.rate else "closed", level, warmup, requests, args.seconds))
    return out


async def check(bench: Bench, endpoints: list[str]) -> float | None:
    """One scored call per endpoint first: tokens per pair (None = the server does not tell), or RuntimeError."""
    for endpoint in endpoints:
        first = await bench.call(endpoint, bench.next_body(endpoint))
        if first.error:
            what = "no server" if first.error == "connect" else f"{first.error} for {endpoint}"
            where, why = without_secrets([bench.base_url]), bench.error_texts[first.error]
            raise RuntimeError(f"{what} at {where}: run sh start_rerank.sh status ({why})")
    bench.checked = True
    return first.tokens / bench.texts.n_docs or None


async def run(args: argparse.Namespace, api_key: str | None, connect_timeout_s: float) -> int:
    """Check the server, make every row, write the files. Returns the exit code."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    timeout = aiohttp.ClientTimeout(total=args.timeout_s, sock_connect=connect_timeout_s)
    # limit=0: never wait for a connection. The server closes one that is idle for 5 s (uvicorn): drop it before.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    texts = Texts(args.seed, args.docs, args.doc_words, args.query_words, args.repeat)
    rows: list[dict] = []
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        bench = Bench(session, args.base_url, args.model, texts)
        try:
            tokens_per_pair = await check(bench, args.endpoint)
        except RuntimeError as exc:
            say(f"[ERR] {exc}")
            return 1
        about = await describe(args, bench, tokens_per_pair)
        for name, value in about.items():
            print(f"# {name}: {'unknown' if value is None else value}")
        print(table_line({name: name for name in COLUMNS}), flush=True)
        about["error_texts"] = bench.error_texts
        for level in levels_of(args):
            row = await run_level(bench, level, args.constant)
            if row:
                rows.append(row)
                print(table_line(row | {"errors": error_cell(row)}), flush=True)
                write_files(args, about, rows)
                for text in doubts(row):
                    say(f"[WARN] {level}: {text}")
            if level.interrupted:
                return 130
    return 0 if any(row["ok"] for row in rows) else 1


def numbers(kind: type, low: float, many: bool = False):
    """argparse type: one number, or several with commas; a bad one is named."""

    def parse(text: str):
        try:
            values = [kind(part) for part in (text.split(",") if many else [text])]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'integer' if kind is int else 'numeric'}") from None
        if not all(low <= value < math.inf for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} is out of range: {low:g} or more is allowed")
        return values if many else values[0]

    return parse


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, str | None, float]:
    """Arguments over configuration; exits 2 for what cannot be used. Returns (args, API key, connect timeout in s)."""
    parser = argparse.ArgumentParser(description="Load test of the running rerank service.")
    add = parser.add_argument
    load, size = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    # fmt: off
    add("--endpoint", default="rerank,score", choices=["rerank", "score", "rerank,score"], help="default: %(default)s")
    load.add_argument("--concurrency", type=numbers(int, 1, True), default=[1, 16, 50, 100, 150],
                      help="closed loop: calls in flight (default: 1,16,50,100,150)")
    load.add_argument("--rate", type=numbers(float, 0.001, True), help="open loop: calls a second, e.g. 5,10")
    add("--constant", action="store_true", help="with --rate: even distances, not Poisson")
    size.add_argument("--requests", type=numbers(int, 1), help="calls a level (default: 100, 3 rounds or 10 s)")
    size.add_argument("--seconds", type=numbers(float, 0.001), help="length of a level")
    add("--warmup", type=numbers(int, 0), help="calls before the window (default: 5, one round or 1 s)")
    add("--docs", type=numbers(int, 1), default=32, help="documents a call (default: %(default)s)")
    add("--doc-words", type=numbers(int, SERIAL_WORDS), default=100, help="words a document (default: %(default)s)")
    add("--query-words", type=numbers(int, SERIAL_WORDS), default=10, help="words a query (default: %(default)s)")
    add("--seed", type=numbers(int, 0), help="of texts and arrivals (default: a new one, printed)")
    add("--repeat", nargs="?", const="all", choices=["all", "query"],
        help="measure the prefix cache: all calls are the same, or share the query")
    add("--base-url", help="default: BASE_URL, else HOST and PORT")
    add("--model", help="default: SERVED_MODEL_NAME")
    add("--timeout-s", help="seconds to wait for an answer (default: TIMEOUT_S)")
    add("--json", metavar="FILE", help="write header and rows")
    add("--csv", metavar="FILE", help="write rows")
    # fmt: on
    args = parser.parse_args(argv)
    args.endpoint = args.endpoint.split(",")
    if args.constant and not args.rate:
        parser.error("argument --constant: needs --rate")
    try:
        cfg = get_config(base_url=args.base_url, served_model_name=args.model, timeout_s=args.timeout_s)
        args.base_url, args.model, args.timeout_s = cfg.local_base_url, cfg.served_model_name, cfg.timeout_s
        if not re.fullmatch(r"https?://([^/@\s]*@)?(\[[\da-fA-F:]+\]|[^:/@\s]+)(:\d{1,5})?(/\S*)?", args.base_url):
            raise ValueError(f"base URL {without_secrets([args.base_url])} is not http://HOST:PORT/v1")
        for name in filter(None, (args.json, args.csv)):
            open(name, "a").close()  # now, not after a long run
    except (ValueError, OSError) as exc:  # ConfigError is a ValueError
        parser.error(str(exc))
    args.argv = argv
    if args.seed is None:
        # A seed that the server has seen finds its texts in the prefix cache: a new one for each run.
        args.seed = random.SystemRandom().randrange(10**9)
        args.argv = [*argv, "--seed", str(args.seed)]
    return args, cfg.api_key, cfg.connect_timeout_s


def main(argv: list[str] | None = None) -> int:
    """0 measured; 1 no server, or no good answer at all; 2 usage; 130 Ctrl-C (what was measured is printed)."""
    args, api_key, connect_timeout_s = parse_args(sys.argv[1:] if argv is None else argv)
    # A socket per call in flight: the usual soft limit of 1024 files is too low for an open loop that queues.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # -1 = no limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard < 65536 else 65536, hard))
    try:
        return asyncio.run(run(args, api_key, connect_timeout_s))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
