"""Overload benchmark of the guard on a real `vllm serve`, and the guard's own cost a call.

    python measurements/guard.py --model minilm    # or a folder; 6 minutes; without --model the guard's own cost only

For each of vLLM with the guard, vLLM with --max-num-queued-reqs, and bare vLLM: start the server and measure in turns
the load of the peak and ten times as many clients. Closed loop: a client waits for its answer; after a refusal it waits
for Retry-After (1 s without that header) and sends another call. With the guard there is a third load, "rude": ten
times as many clients that send again at once. The peak is the best number of clients of the first server, by a search.
Every call has its own query and documents. Goodput counts pairs of complete answers only. Progress: stderr; table and
verdict: stdout; exit code 1 if the guard keeps less than 95 % of the peak, or its refusals exceed 50 ms (p99).

The generator is kept on one core and the engine's threads of the CPU build on the others, as vLLM itself leaves a core
to the API process. Otherwise the refused clients, not the guard, would take the engine's time. Calls are small, so one
call more or less in a turn is 1 %. On a shared machine the wall clock is unreliable. So the table also shows pairs per
core-second left free by other programs, and both ratios to the peak are medians over the turns.
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
import socket
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(KIT)]
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


def limits_cost(n_times: int = 51) -> list[str]:
    """Median microseconds of the limits before parsing, and of parsing, for documents of words with punctuation."""
    from rerank_kit.guard.body import Limits, parse

    rng, limits, lines = random.Random(0), Limits(33554432, 1000, 500000), []
    for n_docs, n_chars in ((32, 500), (100, 500), (100, 5000), (1000, 500)):
        documents = [" ".join(rng.choices((*WORDS, "and,", 'a "name".'), k=n_chars // 6)) for _ in range(n_docs)]
        body = json.dumps({"model": "m", "query": "q" * 40, "documents": documents}).encode()
        taken = {limits.check: [], parse: []}
        for _ in range(n_times):
            for work, times in taken.items():
                start = time.perf_counter()
                work(body)
                times.append((time.perf_counter() - start) * 1e6)
        check, whole = (statistics.median(times) for times in taken.values())
        lines.append(
            f"limits of {n_docs} documents of {n_chars} characters: {check:.0f} us, parsing them {whole:.0f} us"
        )
    return lines


def answers_cost(n_times: int = 2001) -> list[str]:
    """Median microseconds of reading a call's fields, and of what its answer gets, for 100 documents."""
    import msgspec

    from rerank_kit.guard.asked import Asked, understand
    from rerank_kit.guard.dialects import edit

    lines, encode, scale = [], msgspec.json.encode, {"name": "probability", "min": 0, "max": 1, "profile": "x"}
    for n_chars in (500, 2000):
        text = ("word " * n_chars)[:n_chars]
        rows = [{"index": i, "document": {"text": text}, "relevance_score": 0.123456789} for i in range(100)]
        answer = encode({"id": "x", "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}, "results": rows})
        payload = {"model": "m", "query": "q", "documents": [text] * 100}
        works = {
            "fields": lambda payload=payload: understand(Asked(), "/v1/rerank", payload, 1000),
            "meta and usage": lambda data=answer: edit(Asked("", "/v1/rerank"), None, 200, data, encode, scale),
            "return_documents false": lambda data=answer: edit(
                Asked("", "/v1/rerank", texts=False), None, 200, data, encode, scale
            ),
        }
        taken = {}
        for name, work in works.items():
            times = []
            for _ in range(n_times):
                start = time.perf_counter()
                work()
                times.append((time.perf_counter() - start) * 1e6)
            taken[name] = f"{name} {statistics.median(times):.1f} us"
        lines.append(f"100 documents of {n_chars} characters: {', '.join(taken.values())}")
    return lines


def cache_cost(n_calls: int = 1000) -> str:
    """Median microseconds of a call of 32 documents without the result cache, with it, and when it was seen before."""
    from rerank_kit.guard.middleware import Guard

    rng = random.Random(0)

    async def vllm(scope, receive, send):
        texts = json.loads((await receive())["body"])["documents"]
        rows = [{"index": i, "document": {"text": text}, "relevance_score": 0.1 * i} for i, text in enumerate(texts)]
        answer = {"id": "x", "model": "m", "usage": {"prompt_tokens": 1, "total_tokens": 1}, "results": rows}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(answer, separators=(",", ":")).encode()})

    async def call(guard, body):
        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            pass

        start = time.perf_counter()
        await guard({"type": "http", "method": "POST", "path": "/v1/rerank", "headers": []}, receive, send)
        return (time.perf_counter() - start) * 1e6

    async def main():
        guards = []
        for mib in ("0", "64"):
            os.environ["GUARD_RESULT_CACHE_MIB"] = mib
            guards.append(Guard(vllm))
        del os.environ["GUARD_RESULT_CACHE_MIB"]
        taken = {"without": [], "never seen": [], "seen before": []}
        for body in make_bodies(n_calls, 32, 90, "m", rng.randrange(1000)):
            for name, guard in zip(taken, (guards[0], guards[1], guards[1]), strict=True):
                taken[name].append(await call(guard, body))
        return ", ".join(f"{name} {statistics.median(times):.0f} us" for name, times in taken.items())

    return f"result cache, a call of 32 documents of 90 words: {asyncio.run(main())}"


async def _time_calls(body: bytes, n_calls: int) -> tuple[float, float]:
    from rerank_kit.guard.middleware import Guard

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
        for app, taken in times.items():  # in turns, so that noise of the machine affects both
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
    engine_cores = ",".join(map(str, sorted(args.engine_cores)))
    of_cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": engine_cores}  # of the CPU build
    with open(args.log, "ab") as log:
        server = subprocess.Popen(
            command,
            env={**of_cpu, **os.environ, **environment, "PYTHONPATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, args.all_cores),
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


async def closed_loop(args, server, bodies, n_clients: int, seconds: float, ramp_s: float, rude=False) -> Level:
    """n_clients for ramp_s + seconds; calls that end in the last `seconds` count. rude: refused ones do not wait."""
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
            if status != 200 and not rude:
                await asyncio.sleep(wait_s * (1 + 0.2 * rng.random()))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        tasks = [asyncio.create_task(client(session, i)) for i in range(n_clients)]
        await asyncio.sleep(ramp_s)
        level.core_s = -free_core_seconds(server)
        await asyncio.sleep(seconds)
        level.core_s += free_core_seconds(server)
        for task in tasks:  # waiting calls are cancelled; they would only prolong the run
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


async def find_peak(args, label: str, server, bodies) -> int:
    """The number of clients with the highest goodput; the first seconds are warm-up."""
    await closed_loop(args, server, bodies, 4, 5, 0)
    if len(args.clients) == 1:
        return args.clients[0]
    rates = {}
    for n_clients in args.clients:
        level = await closed_loop(args, server, bodies, n_clients, args.seconds, 2)
        rates[n_clients] = level.n_served * args.docs / level.core_s
        print(f"{label}: {n_clients} clients, {rates[n_clients]:.1f} pairs a free core-second", file=sys.stderr)
    if not max(rates.values()):
        sys.exit(f"{label}: no call succeeded; see {args.log}")
    return max(rates, key=rates.get)


async def measure(args, label: str, server, bodies, loads: tuple[str, ...]) -> dict[str, tuple[Level, list[float]]]:
    """{load: (Level, [of_peak by time, by free core-second])}; loads in turns, since the machine's speed varies."""
    args.clients = [await find_peak(args, label, server, bodies)]
    peak = args.clients[0]
    total = {load: Level(peak if load == "peak" else 10 * peak) for load in loads}
    ratios, calm = {load: [] for load in loads}, Level(0)
    for turn in range(args.turns):
        for load in loads:
            ramp_s = 2 if load == "peak" else args.ramp
            level = await closed_loop(args, server, bodies, total[load].n_clients, args.seconds, ramp_s, load == "rude")
            if load == "peak":
                calm = level
            by_time = level.n_served / max(calm.n_served, 1)
            ratios[load].append((by_time, by_time * calm.core_s / level.core_s))
            total[load].add(level)
            shown = "{:.0%} of the peak by time, {:.0%} by free core-second".format(*ratios[load][-1])
            print(f"{label}: turn {turn + 1}: {load}: {shown}", file=sys.stderr)
            await asyncio.sleep(2)  # vLLM drops what the cancelled clients had queued
    return {
        load: (total[load], [statistics.median(values) for values in zip(*ratios[load], strict=True)]) for load in loads
    }


def verdict(args, found: dict[str, tuple[Level, list[float]]]) -> int:
    """Print whether the guard met its aims; 1 = it did not."""
    level, (by_time, by_core) = found["x10"]
    refused_ms = sorted(level.refused_ms)[math.ceil(0.99 * len(level.refused_ms)) - 1] if level.refused_ms else 0.0
    print(
        f"guard at 10x: {by_time:.0%} of the peak by time, {by_core:.0%} by free core-second (aim: 95 %); refusals "
        f"p99 {refused_ms:.0f} ms (aim: 50); accepted calls p99 {percentile(level.served_ms, 0.99, 100)} ms "
        f"(MAX_WAIT_S is {args.max_wait:g} s)"
    )
    return int(by_time < 0.95 or refused_ms > 50)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", help="folder of the checkpoint, or minilm; default: only the guard's cost")
    parser.add_argument("--name", default="qwen3-reranker", help="served model name")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--serve-args", help="arguments of vllm serve; default on a CPU: 0.3 of the memory, bf16")
    parser.add_argument("--generator-core", type=int, help="core of this program; default: the first")
    parser.add_argument("--api-servers", type=int, default=1, help="--api-server-count")
    parser.add_argument("--docs", type=int, default=32, help="documents a call")
    parser.add_argument("--words", type=int, default=24, help="words a document")
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 8], help="numbers of clients to search the peak")
    parser.add_argument("--seconds", type=float, default=8, help="length of one measurement")
    parser.add_argument("--ramp", type=float, default=5, help="seconds of overload before measuring")
    parser.add_argument("--turns", type=int, default=3, help="turns of peak and overload")
    parser.add_argument("--queued", type=int, default=128, help="--max-num-queued-reqs of the second server")
    parser.add_argument("--max-wait", type=float, default=2.0, help="MAX_WAIT_S of the guard")
    parser.add_argument("--max-pairs", type=int, default=0, help="MAX_PAIRS_IN_FLIGHT of the guard; 0 = unset")
    parser.add_argument("--only", choices=("guard", "queued", "bare"), nargs="+", default=["guard", "queued", "bare"])
    parser.add_argument("--log", default="log/bench_guard.log", help="the servers' log")
    parser.add_argument("--start-timeout", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is also stopped
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("\n".join([*guard_cost(), *limits_cost(), *answers_cost(), cache_cost()]))
    if not args.model:
        return 0
    if args.model == "minilm":
        from rerank_kit.models.download import minilm

        args.model = str(minilm())
    if args.serve_args is None:
        args.serve_args = "--gpu-memory-utilization 0.3 --dtype bfloat16" if "cpu" in version("vllm") else ""
    if args.api_servers > 1:
        args.serve_args += f" --api-server-count {args.api_servers}"
    if args.port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            args.port = probe.getsockname()[1]
    args.all_cores = os.sched_getaffinity(0)
    mine = min(args.all_cores) if args.generator_core is None else args.generator_core
    args.engine_cores = args.all_cores - {mine} or args.all_cores
    os.sched_setaffinity(0, {mine})
    settings = {"GUARD_MAX_WAIT_S": str(args.max_wait), "GUARD_MAX_PAIRS_IN_FLIGHT": str(args.max_pairs)}
    settings |= {"GUARD_MAX_DOCS_PER_CALL": "1000", "GUARD_MAX_BODY_BYTES": "33554432"}
    settings |= {"GUARD_LONG_DOCUMENTS": "truncate", "GUARD_API_SERVERS": str(args.api_servers)}
    limits = f"guard, wait {args.max_wait:g} s" + (f", {args.max_pairs} pairs" if args.max_pairs else "")
    servers = {
        "guard": (limits, ["--middleware", "rerank_kit.guard.Guard"], settings, ("peak", "x10", "rude")),
        "queued": (
            f"--max-num-queued-reqs {args.queued}",
            ["--max-num-queued-reqs", str(args.queued)],
            {},
            ("peak", "x10"),
        ),
        "bare": ("bare", [], {}, ("peak", "x10")),
    }
    began, failed = time.monotonic(), 0
    print(f"vllm {version('vllm')}, {args.docs} documents of {args.words} words a call, seed {args.seed}")
    where = f"generator on core {mine}, engine's threads on {sorted(args.engine_cores)}"
    print(f"{where}, the rest unpinned; API processes {args.api_servers}")
    print(f"{args.turns} turns of {args.seconds:g} s each; goodput and offered load in pairs/s\n\n{HEAD}", flush=True)
    pool = make_bodies(1000, args.docs, args.words, args.name, args.seed)

    def endless():
        while True:
            yield from pool

    for key in args.only:
        label, extra, environment, loads = servers[key]
        server = start_server(args, extra, environment)
        try:
            found = asyncio.run(measure(args, label, server, endless(), loads))
        finally:
            stop_server(server)
        for load, (level, of_peak) in found.items():
            print(row(label, load, level, args.docs, of_peak), flush=True)
        if key == "guard":
            failed = verdict(args, found)
    print(f"{time.monotonic() - began:.0f} s in all")
    return failed


if __name__ == "__main__":
    sys.exit(main())
