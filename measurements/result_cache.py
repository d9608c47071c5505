"""What the result cache gives and costs: a service with it beside the same service without, in turns.

    python measurements/result_cache.py [--redis] [--model FOLDER] [--turns 9] [--seconds 3] [--clients 4]

Starts two services on one machine (without --model, of a seeded tiny Qwen3-Reranker) and calls them one after the
other, 32 documents of 60 words a call: first calls that were made before, then calls that nobody made before. A turn
is all four; medians and ratios are over the turns, so that other load of the machine affects both services. Last, a
single client sends each new call to both services in turn, and the median times of the two are compared.
--redis: scores are kept in a redis-server alone, which is started on the way, and not in the process.
Exit code 1 where known calls are less than 10 times as fast, or a new call of the single client takes more than 2 %
longer; the rates of new calls by several clients spread too far to tell 2 %.
"""

import argparse
import http.client
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]
WORDS = ("model", "data", "query", "rank", "score", "paper", "river", "city", "music", "train", "light", "stone")
N_DOCS, N_WORDS, N_KNOWN = 32, 60, 40
WAYS = [(service, kind) for kind in ("seen before", "never seen") for service in ("without", "with")]


def make_body(rng: random.Random) -> bytes:
    documents = [" ".join(rng.choices(WORDS, k=N_WORDS)) for _ in range(N_DOCS)]
    return json.dumps({"query": " ".join(rng.choices(WORDS, k=8)), "documents": documents}).encode()


class Caller:
    """One kept connection."""

    def __init__(self, port: int):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def call(self, body: bytes) -> bytes:
        try:
            answer, data = self._exchange(body)
        except (OSError, http.client.HTTPException):  # the service closes a connection that is idle for 5 s
            self.connection.close()
            answer, data = self._exchange(body)
        if answer.status != 200:
            raise SystemExit(f"HTTP {answer.status}: {data[:300]!r}")
        return data

    def _exchange(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        self.connection.request("POST", "/v1/rerank", body, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        return answer, answer.read()


def calls_per_s(callers: list[Caller], bodies, seconds: float) -> float:
    """All callers for so long, each in a closed loop; bodies() gives the next."""
    end = time.perf_counter() + seconds

    def loop(caller: Caller) -> int:
        n = 0
        while time.perf_counter() < end:
            caller.call(bodies())
            n += 1
        return n

    began = time.perf_counter()
    with ThreadPoolExecutor(len(callers)) as pool:
        n = sum(pool.map(loop, callers))
    return n / (time.perf_counter() - began)


def cached(caller: Caller, body: bytes) -> int:
    return json.loads(caller.call(body))["meta"].get("cached", 0)


def measure(ports: dict[str, int], args: argparse.Namespace) -> tuple[dict, dict]:
    """({(service, kind): calls/s of each turn}, {service: median ms of a new call alone})."""
    rng = random.Random(args.seed)
    callers = {name: [Caller(port) for _ in range(args.clients)] for name, port in ports.items()}
    known = [make_body(rng) for _ in range(N_KNOWN)]
    for _ in range(2):  # the second time finds all kernels and prompts warm
        for body in known:
            for name in ports:
                callers[name][0].call(body)
    time.sleep(0.5)  # what Redis gets is written behind the answer
    found = [[cached(callers[name][0], body) for body in known] for name in ("without", "with")]
    if found != [[0] * N_KNOWN, [N_DOCS] * N_KNOWN]:
        raise SystemExit(f"the services do not know what they should: {found}")
    rates: dict = {way: [] for way in WAYS}
    for turn in range(args.turns):
        for service, kind in WAYS if turn % 2 else WAYS[::-1]:
            bodies = (lambda: rng.choice(known)) if kind == "seen before" else lambda: make_body(rng)
            rates[service, kind].append(calls_per_s(callers[service], bodies, args.seconds))
    times: dict[str, list[float]] = {name: [] for name in ports}
    for n in range(args.alone):
        body = make_body(rng)
        for name in sorted(ports, reverse=bool(n % 2)):
            began = time.perf_counter()
            callers[name][0].call(body)
            times[name].append((time.perf_counter() - began) * 1000)
    return rates, {name: statistics.median(taken) for name, taken in times.items()}


def report(rates: dict, alone: dict, args: argparse.Namespace) -> int:
    where = "Redis alone" if args.redis else "the process"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"{os.cpu_count()} cores, {cpu}, Python {platform.python_version()}; load at the end {load}")
    print(
        f"{N_DOCS} documents of {N_WORDS} words, {args.clients} clients, {args.turns} turns of {args.seconds:g} s, "
        f"kept in {where}"
    )
    print("| call | calls/s without | with the cache | ratio | ratio of each turn |\n|---|---|---|---|---|")
    ratios = {}
    for kind in ("seen before", "never seen"):
        without, with_cache = rates["without", kind], rates["with", kind]
        each = sorted(b / a for a, b in zip(without, with_cache, strict=True))
        ratios[kind] = statistics.median(with_cache) / statistics.median(without)
        print(
            f"| {kind} | {statistics.median(without):.1f} | {statistics.median(with_cache):.1f} | {ratios[kind]:.2f} | "
            f"{each[0]:.2f} to {each[-1]:.2f} |"
        )
    cost = alone["with"] / alone["without"] - 1
    print(f"one client, {args.alone} new calls to each: {alone['without']:.2f} and {alone['with']:.2f} ms, {cost:+.1%}")
    return int(ratios["seen before"] < 10 or cost > 0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", action="store_true")
    parser.add_argument("--model", help="checkpoint folder; default: a seeded tiny one")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--alone", type=int, default=400, help="new calls of one client, to each service")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.redis and not shutil.which("redis-server"):
        raise SystemExit("redis-server is not installed: apt install redis-server")
    from conftest import free_port, run_kit

    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if not model:
            import tiny_models

            model = tiny_models.qwen3_reranker(Path(scratch, "Qwen3-Reranker-tiny"))
        shared = {"MODEL_PATH": model, "DTYPE": "float32", "MAX_MODEL_LEN": 1024, "RESTART": "no", "MAX_WAIT_S": 60}
        redis, cache = None, {"RESULT_CACHE_MIB": 64}
        if args.redis:
            port = free_port()
            command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--maxmemory", "200mb"]
            redis = subprocess.Popen([*command, "--maxmemory-policy", "allkeys-lru"], stdout=subprocess.DEVNULL)
            cache = {"RESULT_CACHE_URL": f"redis://127.0.0.1:{port}"}
        services = {}
        try:
            for name, more in (("without", {}), ("with", cache)):
                settings = shared | more | {"PORT": free_port(), "LOG_DIR": f"{scratch}/{name}"}
                if (started := run_kit("start", shell="sh", **settings)).returncode:
                    raise SystemExit(started.stdout + started.stderr)
                services[name] = settings
            return report(*measure({name: settings["PORT"] for name, settings in services.items()}, args), args)
        finally:
            for settings in services.values():
                run_kit("stop", shell="sh", **settings)
            if redis:
                redis.terminate()
                redis.wait()


if __name__ == "__main__":
    sys.exit(main())
