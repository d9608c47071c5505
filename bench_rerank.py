"""Benchmark of the running service: `rerank` and `score` under load.

    python bench_rerank.py                                  # closed loop, 1 to 150 calls in flight
    python bench_rerank.py --endpoint rerank --rate 5,10    # open loop, calls due at random times
    python bench_rerank.py --saturate                       # how many calls in flight until throughput stops growing
    python bench_rerank.py --slo p95=500ms                  # the highest rate at which 95 % of the calls take 500 ms
    python bench_rerank.py --seconds 20 --runs 5 --json out.json --html out.html
    python bench_rerank.py --compare before.json after.json --fail-over 5

How the numbers are made:

* Closed loop: N workers, each sends its next call when it has its answer. Latency runs from sending.
  Open loop: calls are due on a schedule whatever the server does, and latency runs from the moment a
  call was due, so that a stall counts for every call it delays (no coordinated omission).
* The window opens when the first call after the warm-up is sent (open loop: is due). It closes when a
  worker comes for one more call and the level has no more (open loop: when the next call would be due).
  The load is full all the time between, so neither the start nor the end of a level dilutes throughput.
* ok, refused (429, 503), err and percentiles: the calls that were sent (open loop: due) inside the window,
  all waited for. req/s, pairs/s, tok/s: good answers that arrived inside the window / its length.
* Percentiles are nearest-rank, over good answers. Retries are off. Every answer is checked.
* Where one client process is the limit, the level is made again with twice as many. Processes share one
  schedule and one window; their calls come into one list before any percentile is taken.
docs/benchmarking.md says how to read the result.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from bench_report import (
    COLUMNS,
    calls_of,
    compare,
    cost_lines,
    doubts,
    error_cell,
    hardware,
    highest_rate,
    is_local,
    knee,
    metric_sums,
    server_flags,
    slo_text,
    stops_growing,
    summarise,
    table_line,
    what_changed,
    without_secrets,
    write_files,
)
from bench_workload import (
    CLOSED,
    OPENED,
    TAKEN,
    Bench,
    FileTexts,
    Gate,
    Lengths,
    Level,
    Texts,
    drive,
    drive_processes,
    one_token_words,
    say,
)
from env_utils import get_config

MOST_IN_FLIGHT = 1024  # where --saturate ends
MOST_PROBES = 20  # windows of one --slo search

# --- what is known of the server ---


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


def server_processes(base_url: str) -> dict[int, bool]:
    """{PID: is it an API process} of the server that listens on base_url's port of this host; {} = not seen."""
    if not is_local(base_url):
        return {}
    port, inodes, parents = urlsplit(base_url).port or 80, set(), {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for words in map(str.split, Path(table).read_text().splitlines()[1:] if Path(table).exists() else ()):
            if words[3] == "0A" and int(words[1].rsplit(":", 1)[1], 16) == port:  # 0A: it listens
                inodes.add(f"socket:[{words[9]}]")
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or not ours to read
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if inodes and any(os.readlink(fd) in inodes for fd in (folder / "fd").iterdir()):
                # A forked engine inherits the socket; vLLM names its processes VLLM::EngineCore, VLLM::Worker.
                name = (folder / "cmdline").read_bytes()
                found[pid] = not re.search(rb"EngineCore|Worker", name)
    for pid in list(parents) if found else ():
        line = [pid]
        while line[-1] in parents and line[-1] not in found:
            line.append(parents[line[-1]])
        if line[-1] in found:
            found |= {below: found.get(below, False) for below in line}
    found.pop(os.getpid(), None)
    return found


async def look(bench: Bench) -> dict[str, float]:
    """Counters of the server now: CPU seconds by PID and of the host, sums of /metrics over all engines."""
    now = Counter({"time_s": time.perf_counter()})
    for pid in bench.server_pids:
        with contextlib.suppress(OSError):
            used = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
            now[pid] = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
    if is_local(bench.base_url) and Path("/proc/stat").exists():
        times = [int(t) for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        now |= {"host_all": sum(times), "host_busy": sum(times) - times[3] - times[4]}  # idle, waiting for a disk
    for base_url in bench.base_urls:
        url, timeout = base_url.removesuffix("/v1") + "/metrics", aiohttp.ClientTimeout(total=2)
        with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
            async with bench.session.get(url, timeout=timeout) as answer:
                now.update(metric_sums(await answer.text()) if answer.status == 200 else {})
    return now


async def sample_gpus(samples: list[tuple[float, str]]) -> None:
    """Append (time, line of nvidia-smi) four times a second until cancelled; a line: index, % busy, MiB used."""
    ask = ["--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "250"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    smi = await asyncio.create_subprocess_exec("nvidia-smi", *ask, **pipes)
    try:
        async for line in smi.stdout:
            samples.append((time.perf_counter(), line.decode(errors="replace")))
    finally:
        with contextlib.suppress(ProcessLookupError):
            smi.kill()
        await smi.wait()


async def observe(bench: Bench, gate: Gate) -> dict:
    """What the server did inside the window, by the names in bench_report.SEEN; what cannot be seen is left out."""
    samples, sampling = [], None
    if is_local(bench.base_url) and shutil.which("nvidia-smi"):
        sampling = asyncio.create_task(sample_gpus(samples))
    try:
        while not gate.n[OPENED]:
            await asyncio.sleep(0.02)
        first = await look(bench)
        while not gate.n[CLOSED] or time.perf_counter() < gate.n[CLOSED]:
            await asyncio.sleep(0.02)
        last = await look(bench)
    finally:
        if sampling:
            sampling.cancel()
            await asyncio.wait([sampling])
    inside = [line for at, line in samples if gate.n[OPENED] < at <= gate.n[CLOSED]]
    return what_changed(first, last, bench.server_pids, inside)


async def describe(args: argparse.Namespace, bench: Bench, answers: dict, tokens_per_pair: float | None) -> dict:
    """Everything needed to repeat the run, by name: header of the table and of the JSON file."""
    load = "closed loop, latency from sending"
    if args.rate or args.slo:
        load = f"open loop, {'constant' if args.constant else 'Poisson'} arrivals, latency from the due time"
    size = f"{args.seconds:g} s" if args.seconds else f"{args.requests or 'at least 100'} calls"
    if args.slo and not args.seconds:
        size = "10 s or more"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": without_secrets(["python", "bench_rerank.py", *args.argv]),
        "server": without_secrets([args.base_url]),
        **answers,
        "model": bench.model,
        "services": len(bench.base_urls),
        "server_flags": server_flags(bench.base_url),
        "hardware": hardware() + ("" if is_local(args.base_url) else " (this client's; the server is another host)"),
        "client": f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}, retries off",
        "timeout_s": args.timeout_s,
        "load": f"{load}, {size} a level after the warm-up",
        "texts": bench.texts.about,
        "tokens_per_pair": tokens_per_pair,
        "seed": args.seed,
    }


# --- the rows ---


class Interrupted(Exception):
    """Ctrl-C ended a level; its row is written."""


async def run_level(bench: Bench, level: Level) -> dict | None:
    """Make one row. Ctrl-C ends it early with what was measured so far; None = nothing was."""
    gate = Gate(level.processes)
    say(f"{level}: running" + f" with {level.processes} processes" * (level.processes > 1), live=True)
    seeing = asyncio.create_task(observe(bench, gate))
    try:
        await (drive(bench, level, gate) if level.processes == 1 else drive_processes(bench, level, gate))
        bench.first += int(gate.n[TAKEN])
        return summarise(level, await seeing) if level.opened and level.closed else None
    finally:
        seeing.cancel()
        print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)


def level_of(args: argparse.Namespace, endpoint: str, mode: str, level: float, **more) -> Level:
    """One row to make, with the sizes asked for."""
    # Warm-up: closed loop one round, open loop about a second.
    warmup = max(5, math.ceil(level)) if args.warmup is None else args.warmup
    requests = args.requests or max(100, math.ceil((10 if mode == "open" else 3) * level))
    if mode == "closed":
        # Whole rounds: of answers that come in waves, a part of a wave would take no time.
        requests = math.ceil(requests / level) * level
    return Level(endpoint, mode, level, warmup, requests, **{"seconds": args.seconds, "constant": args.constant} | more)


def levels_of(args: argparse.Namespace) -> list[Level]:
    """The rows to make: per run, per endpoint, per level. Runs come one after the other: drift reaches all levels."""
    mode, levels = ("open", args.rate) if args.rate else ("closed", args.concurrency)
    wanted = itertools.product(range(1, args.runs + 1), args.endpoint, levels)
    return [level_of(args, endpoint, mode, level, run=run) for run, endpoint, level in wanted]


class Rows:
    """Makes rows, prints and writes each, and adds client processes where the client is the limit."""

    def __init__(self, args: argparse.Namespace, bench: Bench, about: dict):
        self.args, self.bench, self.about, self.rows = args, bench, about, []
        cores = len(os.sched_getaffinity(0))
        # A server on this host needs cores too.
        self.most = args.processes or (max(2, cores // 2) if is_local(args.base_url) else cores)
        self.processes = args.processes or 1

    async def make(self, level: Level) -> dict:
        """Row of a level, made again with twice the processes as long as the client is the limit.

        Raises:
            Interrupted: Ctrl-C.
        """
        most = min(self.most, int(level.level)) if level.mode == "closed" else self.most
        level.processes = min(self.processes, most)
        row = await run_level(self.bench, level)
        # A client that is late with little work waits for a core: more processes would wait too.
        while row and row["client_limited"] and row["client_cpu"] > 0.25 and level.processes < most:
            if level.interrupted:
                break
            self.processes = min(2 * level.processes, most)
            say(f"[INFO] {level}: the client was the limit, again with {self.processes} processes")
            level = dataclasses.replace(level, processes=self.processes, calls=[], lags_s=[], cpu=0.0)
            row = await run_level(self.bench, level)
        if row:
            self.rows.append(row)
            print(table_line(row | {"errors": error_cell(row)}), flush=True)
            self.write()
            for text in doubts(row):
                say(f"[WARN] {level}: {text}")
            if (lines := self.bench.texts.lines) and self.bench.first > lines:
                say(f"[WARN] {level}: the file's {lines} calls came again, which the prefix cache knows")
        if level.interrupted:
            raise Interrupted
        return row

    def write(self) -> None:
        write_files({"json": self.args.json, "csv": self.args.csv, "html": self.args.html}, self.about, self.rows)


# --- searches ---


async def saturate(rows: Rows, endpoint: str) -> str:
    """Double the calls in flight until throughput stops growing. Returns the finding in a sentence."""
    made, n = [], 1
    while n <= MOST_IN_FLIGHT and not stops_growing(made):
        made.append(await rows.make(level_of(rows.args, endpoint, "closed", n)))
        n *= 2
    at = knee(made)
    head = f"{endpoint}: throughput stops growing at about {at['level']:g} calls in flight"
    if not stops_growing(made):
        head = f"{endpoint}: throughput was still growing at {made[-1]['level']:g} calls in flight"
    tail = f"{at['req/s']:.4g} req/s, {at['pairs/s']:.4g} pairs/s, p50 {at['p50_ms'] or math.nan:.4g} ms"
    client = "; the client was the limit there, the service may go on" if at["client_limited"] else ""
    return f"{head}: {tail} (levels double; 95 % of the best counts as it){client}"


async def search_slo(rows: Rows, endpoint: str) -> str:
    """Find the highest open-loop rate that holds the SLO. Returns the finding in sentences."""
    args, (p, slo_ms), made = rows.args, rows.args.slo, []
    first = await rows.make(level_of(args, endpoint, "closed", 16))
    if not first["req/s"]:
        return f"{endpoint}: no good answer, no search"

    async def held(rate: float) -> bool:
        # 20 times the SLO: an overload of more than 1 / (20 p) lets calls wait longer than the SLO inside the window.
        # Five times the calls that the percentile needs, as far as two minutes give them.
        seconds = args.seconds or max(10.0, 0.02 * slo_ms, min(120.0, 500 / (100 - p) / rate))
        # A rate that is tried again may be the answer: rare long queues need a longer look.
        seconds *= 3 if any(row["level"] == rate for row in made) else 1
        level = level_of(args, endpoint, "open", rate, seconds=seconds, slo_ms=slo_ms, run=len(made) + 1)
        row = await rows.make(level)
        made.append(row)
        same = [one for one in made if one["level"] == rate]
        calls, missed = sum(map(calls_of, same)), sum(one["slo_missed"] for one in same)
        row["slo_held"] = missed <= calls * (100 - p) / 100
        said = "held" if row["slo_held"] else "missed"
        windows = f"{len(same)} window" + "s" * (len(same) > 1)
        say(f"[INFO] {level}: {missed} of {calls} calls missed in {windows}: p{p} <= {slo_ms:g} ms {said}")
        return row["slo_held"]

    low, high, sure = await highest_rate(held, float(f"{0.7 * first['req/s']:.3g}"), MOST_PROBES)
    return slo_text(f"{endpoint}: p{p} <= {slo_ms:g} ms", p, slo_ms, made, low, high, sure)


# --- the program ---


async def check(bench: Bench, endpoints: list[str]) -> float | None:
    """One scored call per endpoint first: tokens per pair (None = the server does not tell), or RuntimeError."""
    for endpoint in endpoints:
        first = await bench.call(endpoint, *bench.body(endpoint, 0))
        bench.first += 1
        if first.error:
            what = "no server" if first.error == "connect" else f"{first.error} for {endpoint}"
            where, why = without_secrets([bench.addresses]), bench.error_texts[first.error]
            raise RuntimeError(f"{what} at {where}: run sh start_rerank.sh status ({why})")
    bench.checked = True
    return first.tokens / first.pairs or None


def texts_of(args: argparse.Namespace, model_root: str | None) -> Texts | FileTexts:
    """The texts to send. Raises ValueError: no tokenizer for lengths in tokens, a broken --input; OSError."""
    if args.input:
        return FileTexts(args.input, args.seed)
    doc, query, words = args.doc_tokens or args.doc_words, args.query_tokens or args.query_words, None
    if args.doc_tokens or args.query_tokens:
        folder = args.tokenizer or model_root
        if not folder or not Path(folder).is_dir():
            raise ValueError(
                f"lengths in tokens need --tokenizer FOLDER: the server's model ({folder}) is no folder here"
            )
        words = one_token_words(folder)
    return Texts(args.seed, args.docs or 32, doc, query, args.repeat, words)


async def run(args: argparse.Namespace, api_key: str | None, connect_timeout_s: float) -> int:
    """Check the server, make every row, write the files. Returns the exit code."""
    async with Bench(args.base_url, args.model, None, api_key, args.timeout_s, connect_timeout_s) as bench:
        answers = await ask_server(bench)
        try:
            bench.texts = texts_of(args, answers["model_root"])
        except (ValueError, OSError) as exc:
            say(f"[ERR] {exc}")
            return 2
        try:
            tokens_per_pair = await check(bench, args.endpoint)
        except RuntimeError as exc:
            say(f"[ERR] {exc}")
            return 1
        for base_url in bench.base_urls:
            bench.server_pids |= server_processes(base_url)
        about = await describe(args, bench, answers, tokens_per_pair)
        for name, value in about.items():
            print(f"# {name}: {'unknown' if value is None else value}")
        print(table_line({name: name for name in COLUMNS}), flush=True)
        about |= {"error_texts": bench.error_texts, "findings": []}
        rows = Rows(args, bench, about)
        try:
            if args.saturate or args.slo:
                for endpoint in args.endpoint:
                    about["findings"].append(await (saturate if args.saturate else search_slo)(rows, endpoint))
            else:
                for level in levels_of(args):
                    await rows.make(level)
        except Interrupted:
            return 130
        except RuntimeError as exc:
            say(f"[ERR] {exc}")
            return 1
    for row in rows.rows:
        about["findings"].append(f"{row['endpoint']} {row['mode']} {row['level']:g}: {row['bound']}: {row['verdict']}")
    if args.price_per_hour or args.target_pairs_s:
        about["findings"] += cost_lines(about, rows.rows, args.price_per_hour, args.target_pairs_s)
    for text in about["findings"]:
        print(f"# {text}")
    rows.write()
    return 0 if any(row["ok"] for row in rows.rows) else 1


def run_compare(names: list[str], fail_over: float | None) -> int:
    """Print how each file differs from the first. 1 = a regression of more than fail_over %, 2 = cannot be told."""
    try:
        outs = [json.loads(Path(name).read_text("utf-8")) for name in names]
        code = 0
        print("# intervals: 95 %, Welch's t over the runs of a level, in % of the first file's mean")
        for name, out in zip(names[1:], outs[1:], strict=True):
            print(f"# {names[0]} -> {name}")
            lines, worse, untold = compare(outs[0], out, fail_over)
            print("\n".join(lines))
            if fail_over is not None and untold:
                say(f"[ERR] --fail-over cannot judge {untold}")
                code = 2
            for text in worse:
                say(f"[ERR] regression of more than {fail_over:g} %: {text}")
            code = 1 if worse else code
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        say(f"[ERR] --compare: not a file that --json wrote: {exc!r}")
        return 2
    return code


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


def lengths(text: str) -> str:
    """argparse type: a text that Lengths can parse."""
    try:
        return Lengths.parse(text).spec
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def slo(text: str) -> tuple[int, float]:
    """argparse type: `p95=500ms` or `p99=2s` as (95, 500.0)."""
    found = re.fullmatch(r"p(50|90|95|99)=(\d+(?:\.\d+)?)(ms|s)", text)
    if not found or not float(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an SLO: write p95=500ms (p50, p90, p95 or p99; ms or s)")
    return int(found[1]), float(found[2]) * (1000 if found[3] == "s" else 1)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, str | None, float]:
    """Arguments over configuration; exits 2 for what cannot be used. Returns (args, API key, connect timeout in s)."""
    parser = argparse.ArgumentParser(description="Load test of the running rerank service.")
    add = parser.add_argument
    load, size, doc, query = (parser.add_mutually_exclusive_group() for _ in range(4))
    # fmt: off
    add("--endpoint", default="rerank,score", choices=["rerank", "score", "rerank,score"], help="default: %(default)s")
    load.add_argument("--concurrency", type=numbers(int, 1, True), default=[1, 16, 50, 100, 150],
                      help="closed loop: calls in flight (default: 1,16,50,100,150)")
    load.add_argument("--rate", type=numbers(float, 0.001, True), help="open loop: calls a second, e.g. 5,10")
    load.add_argument("--saturate", action="store_true",
                      help="closed loop: double the calls in flight until throughput stops growing")
    load.add_argument("--slo", type=slo, metavar="p95=500ms",
                      help="open loop: find the highest rate at which p50, p90, p95 or p99 stays below")
    add("--constant", action="store_true", help="with --rate or --slo: even distances, not Poisson")
    size.add_argument("--requests", type=numbers(int, 1), help="calls a level (default: 100, 3 rounds or 10 s)")
    size.add_argument("--seconds", type=numbers(float, 0.001), help="length of a level")
    add("--warmup", type=numbers(int, 0), help="calls before the window (default: 5, one round or 1 s)")
    add("--runs", type=numbers(int, 1), default=1, help="make all levels so often, for --compare (default: 1)")
    add("--processes", type=numbers(int, 1), help="client processes (default: 1, more where the client is the limit)")
    add("--docs", type=numbers(int, 1), help="documents a call (default: 32)")
    doc.add_argument("--doc-words", type=lengths, default="100",
                     help="words a document: 100, 64-512 (uniform) or lognormal:MEAN,SIGMA (default: %(default)s)")
    doc.add_argument("--doc-tokens", type=lengths, help="the same in tokens")
    query.add_argument("--query-words", type=lengths, default="10", help="words a query (default: %(default)s)")
    query.add_argument("--query-tokens", type=lengths, help="the same in tokens")
    add("--tokenizer", metavar="FOLDER", help="for lengths in tokens (default: the served model's folder)")
    add("--input", metavar="FILE", help='your own calls, JSONL: {"query": "...", "documents": ["...", ...]}')
    add("--seed", type=numbers(int, 0), help="of texts and arrivals (default: a new one, printed)")
    add("--repeat", nargs="?", const="all", choices=["all", "query"],
        help="measure the prefix cache: all calls are the same, or share the query")
    add("--base-url", help="default: BASE_URL, else HOST and PORT; of several (commas) a call takes the least busy one")
    add("--model", help="default: SERVED_MODEL_NAME")
    add("--timeout-s", help="seconds to wait for an answer (default: TIMEOUT_S)")
    add("--json", metavar="FILE", help="write header and rows")
    add("--csv", metavar="FILE", help="write rows")
    add("--html", metavar="FILE", help="write one page with charts")
    add("--price-per-hour", type=numbers(float, 0), help="of the service: gives the cost of a million pairs")
    add("--target-pairs-s", type=numbers(float, 0.001, True), help="how many GPUs these rates need, e.g. 1000,5000")
    add("--compare", nargs="+", metavar="FILE", help="measure nothing: compare files of --json with the first one")
    add("--fail-over", type=numbers(float, 0), metavar="PERCENT", help="with --compare: exit 1 on a worse change")
    # fmt: on
    args = parser.parse_args(argv)
    args.endpoint = args.endpoint.split(",")
    words = {w.partition("=")[0] for w in argv}
    texts = words & {"--docs", "--doc-words", "--doc-tokens", "--query-words", "--query-tokens", "--repeat"}
    for wrong, text in (
        (args.constant and not (args.rate or args.slo), "--constant: needs --rate or --slo"),
        (args.input and texts, f"{min(texts, default='')}: not with --input, which brings its own texts"),
        (args.runs > 1 and (args.slo or args.saturate), "--runs: not with a search"),
        (args.tokenizer and not (args.doc_tokens or args.query_tokens), "--tokenizer: needs lengths in tokens"),
        (args.slo and args.requests, "--requests: not with --slo, give --seconds"),
        (args.fail_over is not None and not args.compare, "--fail-over: needs --compare"),
        (args.compare and len(args.compare) < 2, "--compare: needs two files or more"),
    ):
        if wrong:
            parser.error(f"argument {text}")
    try:
        cfg = get_config(base_url=args.base_url, served_model_name=args.model, timeout_s=args.timeout_s)
        args.base_url, args.model, args.timeout_s = cfg.local_base_url, cfg.served_model_name, cfg.timeout_s
        for url in map(str.strip, args.base_url.split(",")):
            if not re.fullmatch(r"https?://([^/@\s]*@)?(\[[\da-fA-F:]+\]|[^:/@\s]+)(:\d{1,5})?(/\S*)?", url):
                raise ValueError(f"base URL {without_secrets([url])} is not http://HOST:PORT/v1")
        for name in filter(None, (args.json, args.csv, args.html)):
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
    """0 done; 1 no server, no good answer, or a regression; 2 usage; 130 Ctrl-C (what was measured is printed)."""
    args, api_key, connect_timeout_s = parse_args(sys.argv[1:] if argv is None else argv)
    if args.compare:
        return run_compare(args.compare, args.fail_over)
    # A socket per call in flight: the usual soft limit of 1024 files is too low for an open loop that queues.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # -1 = no limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard < 65536 else 65536, hard))
    try:
        return asyncio.run(run(args, api_key, connect_timeout_s))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
