"""Half an hour of mixed load on a real service, to find memory and other resources that grow.

    python measurements/soak.py [--minutes 30] [--model FOLDER]

Starts a service of its own (without --model, of a seeded tiny Qwen3-Reranker), calls it with the kit's client at a
fixed rate, among them long documents, refused calls and clients that leave, and prints once a minute what its
processes hold. Ends with the first and the last line to compare; exit code 1 when calls failed. The result goes into
docs/reliability.md.
"""

import argparse
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]
COLUMNS = ("minute", "calls", "errors", "memory_mib", "client_mib", "descriptors", "threads", "log_kib", "processes")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rss_mib(pid: int | str) -> float:
    """Private memory of a process (RssAnon), MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Load:
    """Threads that share a call rate; the kind of each call is random."""

    def __init__(self, url: str, calls_per_s: float, n_threads: int = 8):
        self.url, self.pause_s = url, n_threads / calls_per_s
        self.seen: Counter = Counter()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(i,), daemon=True) for i in range(n_threads)]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        from rerank_kit.client.calls import rerank, score
        from rerank_kit.client.errors import RerankError, RerankHTTPError, RerankTimeout

        rng = random.Random(number)
        words = ["capital", "china", "beijing", "gravity", "bodies", "search", "engine", "documents"]
        kinds = ["rerank"] * 6 + ["score"] * 4 + ["long", "chunk", "refused", "leaves"]
        while not self.over.wait(rng.expovariate(1 / self.pause_s)):
            kind = rng.choice(kinds)
            query = " ".join(rng.choices(words, k=6))
            documents = [" ".join(rng.choices(words, k=rng.randint(3, 80))) for _ in range(rng.randint(1, 16))]
            try:
                if kind == "score":
                    score(query, documents, base_url=self.url)
                elif kind in ("long", "chunk"):
                    mode = "chunk" if kind == "chunk" else None
                    rerank(query, [*documents, "word " * 3000], base_url=self.url, long_documents=mode)
                elif kind == "refused":
                    rerank(query, documents, base_url=self.url, model="no such model")
                elif kind == "leaves":
                    rerank(query, documents * 4, base_url=self.url, timeout_s=0.01)
                else:
                    rerank(query, documents, 3, base_url=self.url)
                self.seen[kind] += 1
            except RerankHTTPError as exc:
                self.seen[kind if kind == "refused" and exc.status_code == 404 else f"error {exc.status_code}"] += 1
            except RerankTimeout:
                self.seen[kind if kind == "leaves" else "error timeout"] += 1
            except RerankError as exc:
                self.seen[f"error {type(exc).__name__}"] += 1


def measure(minute: int, load: Load, leader: int, log: Path) -> dict:
    from rerank_kit.processes import session_pids

    pids = session_pids(leader)
    errors = sum(n for kind, n in load.seen.items() if kind.startswith("error"))
    return {
        "minute": minute,
        "calls": sum(load.seen.values()),
        "errors": errors,
        "memory_mib": round(sum(rss_mib(pid) for pid in pids)),
        "client_mib": round(rss_mib("self")),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        "log_kib": log.stat().st_size // 1024,
        "processes": len(pids),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--model", help="checkpoint folder; default: a seeded tiny one")
    parser.add_argument("--calls-per-s", type=float, default=5.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model
        if not model:
            import tiny_models

            model = tiny_models.qwen3_reranker(Path(scratch, "Qwen3-Reranker-tiny"))
        port = free_port()
        settings = {
            "MODEL_PATH": model,
            "PORT": port,
            "LOG_DIR": scratch,
            "MAX_MODEL_LEN": 1024,
            "PYTHON": sys.executable,
        }
        env = {**os.environ, "KIT_ENV_FILE": "/nonexistent", **{k: str(v) for k, v in settings.items()}}
        script = ["sh", str(KIT / "start_rerank.sh")]
        if subprocess.run([*script, "start"], env=env).returncode:
            return 1
        try:
            leader = int(Path(scratch, f"rerank-{port}.pid").read_text().split()[0])
            load = Load(f"http://127.0.0.1:{port}/v1", args.calls_per_s)
            rows = []
            print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
            for minute in range(args.minutes + 1):
                time.sleep(60 if minute else 30)  # the first line after half a minute of warming up
                rows.append(measure(minute, load, leader, Path(scratch, f"rerank-{port}.log")))
                print("| " + " | ".join(str(rows[-1][name]) for name in COLUMNS) + " |", flush=True)
            load.over.set()
            for thread in load.threads:
                thread.join(30)
            print(f"calls by kind: {dict(sorted(load.seen.items()))}")
            subprocess.run([*script, "status"], env=env)
            for name in COLUMNS[3:]:
                print(f"{name}: {rows[0][name]} -> {rows[-1][name]}")
            return 1 if rows[-1]["errors"] else 0
        finally:
            subprocess.run([*script, "stop"], env=env)


if __name__ == "__main__":
    sys.exit(main())
