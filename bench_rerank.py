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
import datetime
import itertools
import math
import platform
import random
import re
import resource
import sys
import time

import aiohttp

from bench_report import (
    COLUMNS,
    doubts,
    error_cell,
    hardware,
    is_local,
    server_flags,
    summarise,
    table_line,
    without_secrets,
    write_files,
)
from bench_workload import SERIAL_WORDS, Bench, Level, Texts, drive_closed, drive_open, say
from env_utils import get_config


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
