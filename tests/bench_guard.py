"""Overload benchmark of server_guard.py on a real `vllm serve`, and the guard's own cost a call.

    python tests/bench_guard.py --model FOLDER [--port 18200] [--serve-args '--gpu-memory-utilization 0.3']

For each of bare vLLM, vLLM with --max-num-queued-reqs, and vLLM with the guard: start the server, find the number of
clients with the highest goodput, then measure that load and ten times as many clients in turns. Closed loop: a client
waits for its answer; after a refusal it waits for Retry-After (1 s without that header) and sends another call. Every
call has its own query and documents. Goodput counts pairs of complete answers only. Progress: stderr; table: stdout.

On a machine that others use too, the wall clock says little. So pairs per core-second that other programs left free
stand beside the goodput, and both ratios to the peak are medians over the turns.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import platform
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
WORDS = ("model", "data", "query", "rank", "score", "paper", "river", "city", "music", "train", "light", "stone")


def make_bodies(n_calls: int, n_docs: int, n_words: int, model: str, seed: int) -> list[bytes]:
    """n_calls different rerank bodies."""
    rng = random.Random(seed)

    def text(n):
        return " ".join(rng.choices(WORDS, k=n))

    return [
        json.dumps({"model": model, "query": text(8), "documents": [text(n_words) for _ in range(n_docs)]}).encode()
        for _ in range(n_calls)
    ]


def percentile(values: list[float], share: float, least: int) -> str:
    """Nearest rank; '-' where the sample is too small."""
    if len(values) < least:
        return "-"
    return f"{sorted(values)[math.ceil(share * len(values)) - 1]:.0f}"


# ---- the guard's own cost ----


def guard_cost(n_calls: int = 3000) -> list[str]:
    """Median microseconds that the guard adds to a call of 32 documents of 500 characters, in process."""
    sys.path.insert(0, str(KIT))
    rng = random.Random(0)
    texts = {
        "ASCII": ["".join(rng.choices("abcdefghij klmnop", k=500)) for _ in range(32)],
        "Chinese": ["".join(rng.choices("检索文档排序模型查询相关性", k=500)) for _ in range(32)],
    }
    settings = {"GUARD_MAX_DOCS_PER_CALL": "1000", "GUARD_MAX_BODY_BYTES": "33554432", "VLLM_API_KEY": "sesame"}
    settings |= {"GUARD_MAX_CHARS_PER_FIELD": "500000", "GUARD_MAX_WAIT_S": "10", "GUARD_SLOW_CALL_MS": "30000"}
    lines = []
    for name, documents in texts.items():
        body = json.dumps({"model": "m", "query": "q" * 40, "documents": documents}, ensure_ascii=False).encode()
        for what, extra in (("passed on", {}), ("max_tokens_per_doc filled in", {"GUARD_MAX_TOKENS_PER_DOC": "512"})):
            os.environ.update(settings | extra)
            with_guard, without = asyncio.run(_time_calls(body, n_calls))
            for key in settings | extra:
                del os.environ[key]
            cost = f"{with_guard - without:6.1f} us a call"
            lines.append(f"guard's cost, 32 documents of 500 characters ({name}, {len(body)} bytes), {what}: {cost}")
    return lines


async def _time_calls(body: bytes, n_calls: int) -> tuple[float, float]:
    from server_guard import Guard

    async def null_app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        pass

    length = str(len(body)).encode()
    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", length)]
    headers += [(b"authorization", b"Bearer sesame"), (b"user-agent", b"x"), (b"accept", b"*/*")]
    scope = {"type": "http", "method": "POST", "path": "/v1/rerank", "headers": headers}
    times = {Guard(null_app): [], null_app: []}
    for _ in range(n_calls):
        for app, taken in times.items():  # in turns: noise of the machine hits both
            start = time.perf_counter()
            await app(dict(scope), receive, send)
            taken.append(time.perf_counter() - start)
    for taken in times.values():
        del taken[: n_calls // 10]  # warm-up
    return tuple(statistics.median(taken) * 1e6 for taken in times.values())


# ---- the server ----


def start_server(args, extra: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start `vllm serve` in its own process group and wait until it is healthy. Its log is args.log."""
    import requests

    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", args.model, "--served-model-name", args.name, "--host", "127.0.0.1"]
    command += ["--port", str(args.port), "--runner", "pooling", "--disable-uvicorn-access-log"]
    command += [*shlex.split(args.serve_args), *extra]
    path = os.pathsep.join(filter(None, [str(KIT), os.environ.get("PYTHONPATH")]))
    with open(args.log, "ab") as log:
        server = subprocess.Popen(
            command,
            env={**os.environ, **environment, "PYTHONPATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    end = time.monotonic() + args.start_timeout
    while True:
        try:
            if requests.get(f"http://127.0.0.1:{args.port}/health", timeout=2).ok:
                return server
        except requests.RequestException:
            pass
        if server.poll() is not None or time.monotonic() > end:
            stop_server(server)
            sys.exit(f"the server did not start: see {args.log}")
        time.sleep(0.5)


def stop_server(server: subprocess.Popen) -> None:
    """TERM to the server itself, which stops its engine; KILL to what is left of its group."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def free_core_seconds(server: subprocess.Popen) -> float:
    """Core-seconds since boot that were idle or went to the server's process group or to this program (proc(5))."""
    idle, iowait = (int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[4:6])
    ticks = idle + iowait
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == server.pid or stat.parent.name == str(os.getpid()):
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# ---- the load ----


class Level:
    """What n_clients saw."""

    def __init__(self, n_clients: int):
        self.n_clients = n_clients
        self.served_ms, self.refused_ms = [], []
        self.errors, self.n_served, self.n_sent, self.seconds, self.core_s = 0, 0, 0, 0.0, 0.0

    def add(self, other: "Level") -> None:
        self.served_ms += other.served_ms
        self.refused_ms += other.refused_ms
        for name in ("errors", "n_served", "n_sent", "seconds", "core_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


async def closed_loop(args, server, bodies, n_clients: int, seconds: float, ramp_s: float) -> Level:
    """n_clients for ramp_s + seconds; calls that end in the last `seconds` count."""
    import aiohttp

    level = Level(n_clients)
    url = f"http://127.0.0.1:{args.port}/v1/rerank"
    begin = time.perf_counter() + ramp_s
    end = begin + seconds

    async def client(session, number):
        rng = random.Random(number)
        await asyncio.sleep(rng.random() * min(ramp_s, 1))
        while (start := time.perf_counter()) < end:
            wait_s = 0
            try:
                async with session.post(url, data=next(bodies), headers={"content-type": "application/json"}) as answer:
                    content = await answer.read()
                    status, wait_s = answer.status, float(answer.headers.get("retry-after", 1))
            except (aiohttp.ClientError, TimeoutError):
                status, content = 0, b""
            now = time.perf_counter()
            if begin <= now < end:
                level.n_sent += 1
                if status == 200 and len(json.loads(content)["results"]) == args.docs:
                    level.n_served += 1
                    level.served_ms.append((now - start) * 1000)
                elif status in (429, 503):
                    level.refused_ms.append((now - start) * 1000)
                else:
                    level.errors += 1
            if status != 200:
                await asyncio.sleep(wait_s * (1 + 0.2 * rng.random()))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        tasks = [asyncio.create_task(client(session, i)) for i in range(n_clients)]
        await asyncio.sleep(ramp_s)
        level.core_s = -free_core_seconds(server)
        await asyncio.sleep(seconds)
        level.core_s += free_core_seconds(server)
        for task in tasks:  # what still waits is cancelled: it would only prolong the run
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    level.seconds = seconds
    return level


HEAD = (
    f"{'server':<27} {'load':<4} clients  offered  goodput  of_peak  pairs/core_s  of_peak    ok  refused  err"
    "   p50_ms   p99_ms   max_ms  ref_p50  ref_p99"
)


def row(label: str, what: str, level: Level, n_docs: int, of_peak=(1.0, 1.0)) -> str:
    pairs = level.n_served * n_docs
    ok_ms, refused_ms = level.served_ms, level.refused_ms
    cells = [
        f"{label:<27} {what:<4} {level.n_clients:>7}",
        f"{level.n_sent * n_docs / level.seconds:>7.0f}",
        f"{pairs / level.seconds:>7.1f}",
        f"{of_peak[0]:>7.0%}",
        f"{pairs / level.core_s:>12.1f}",
        f"{of_peak[1]:>7.0%}",
        f"{level.n_served:>4}",
        f"{len(refused_ms):>7}",
        f"{level.errors:>3}",
        f"{percentile(ok_ms, 0.5, 2):>7}",
        f"{percentile(ok_ms, 0.99, 100):>7}",
        f"{max(ok_ms, default=0):>7.0f}",
        f"{percentile(refused_ms, 0.5, 2):>7}",
        f"{percentile(refused_ms, 0.99, 100):>7}",
    ]
    return "  ".join(cells)


async def measure(args, label: str, server, bodies) -> list[str]:
    """Peak and ten times overload of the running server, in turns, so that a change of the machine hits both."""
    await closed_loop(args, server, bodies, 4, 5, 0)
    best, peak_clients = 0.0, 0
    for n_clients in args.clients:
        level = await closed_loop(args, server, bodies, n_clients, args.seconds, 3)
        pairs_per_core_s = level.n_served * args.docs / level.core_s
        print(f"{label}: {n_clients} clients, {pairs_per_core_s:.1f} pairs a free core-second", file=sys.stderr)
        if pairs_per_core_s > best:
            best, peak_clients = pairs_per_core_s, n_clients
    if not best:
        sys.exit(f"{label}: no call succeeded; see {args.log}")
    peak, over, ratios = Level(peak_clients), Level(10 * peak_clients), []
    for turn in range(args.turns):
        calm = await closed_loop(args, server, bodies, peak.n_clients, args.seconds, 3)
        rush = await closed_loop(args, server, bodies, over.n_clients, args.seconds, args.ramp)
        by_time = rush.n_served / max(calm.n_served, 1)
        ratios.append((by_time, by_time * calm.core_s / rush.core_s))
        shown = f"x10 / peak = {ratios[-1][0]:.0%} by time, {ratios[-1][1]:.0%} by free core-second"
        print(f"{label}: turn {turn + 1}: {shown}", file=sys.stderr)
        peak.add(calm)
        over.add(rush)
        await asyncio.sleep(3)  # vLLM drops what the cancelled clients had queued
    of_peak = [statistics.median(values) for values in zip(*ratios, strict=True)]
    return [row(label, "peak", peak, args.docs), row(label, "x10", over, args.docs, of_peak)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder or id of the checkpoint; without it only the guard's cost is measured")
    parser.add_argument("--name", default="qwen3-reranker", help="served model name")
    parser.add_argument("--port", type=int, default=18200)
    parser.add_argument("--serve-args", default="", help="more arguments for vllm serve, as in a shell")
    parser.add_argument("--docs", type=int, default=32, help="documents a call")
    parser.add_argument("--words", type=int, default=80, help="words a document")
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 8], help="numbers of clients to find the peak at")
    parser.add_argument("--seconds", type=float, default=20, help="length of one measurement")
    parser.add_argument("--ramp", type=float, default=10, help="seconds of overload before it counts")
    parser.add_argument("--turns", type=int, default=5, help="how often peak and overload take turns")
    parser.add_argument("--queued", type=int, default=128, help="--max-num-queued-reqs of the second server")
    parser.add_argument("--max-wait", type=float, default=4.0, help="MAX_WAIT_S of the guard")
    parser.add_argument("--max-pairs", type=int, default=0, help="MAX_PAIRS_IN_FLIGHT of the guard; 0 = unset")
    parser.add_argument("--only", choices=("bare", "queued", "guard"), nargs="+", default=["bare", "queued", "guard"])
    parser.add_argument("--log", default="bench_guard.log", help="the servers' log")
    parser.add_argument("--start-timeout", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("\n".join(guard_cost()))
    if not args.model:
        return 0
    settings = {"GUARD_MAX_WAIT_S": str(args.max_wait), "GUARD_MAX_PAIRS_IN_FLIGHT": str(args.max_pairs)}
    settings |= {"GUARD_MAX_DOCS_PER_CALL": "1000", "GUARD_MAX_BODY_BYTES": "33554432"}
    limits = f"guard, wait {args.max_wait:g} s" + (f", {args.max_pairs} pairs" if args.max_pairs else "")
    servers = {
        "bare": ("bare", [], {}),
        "queued": (f"--max-num-queued-reqs {args.queued}", ["--max-num-queued-reqs", str(args.queued)], {}),
        "guard": (limits, ["--middleware", "server_guard.Guard"], settings),
    }
    print(f"vllm {version('vllm')}, {args.docs} documents of {args.words} words a call, seed {args.seed}")
    print(f"{args.turns} turns of {args.seconds:g} s each; goodput and offered load in pairs/s\n\n{HEAD}", flush=True)
    pool = make_bodies(1000, args.docs, args.words, args.name, args.seed)

    def endless():
        while True:
            yield from pool

    for key in args.only:
        label, extra, environment = servers[key]
        server = start_server(args, extra, environment)
        try:
            print("\n".join(asyncio.run(measure(args, label, server, endless()))), flush=True)
        finally:
            stop_server(server)
    return 0


if __name__ == "__main__":
    sys.exit(main())
