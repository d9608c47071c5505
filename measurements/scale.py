"""How does throughput grow with the GPUs? Starts arrangements of services, loads each, writes a table.

    python measurements/scale.py --model FOLDER --arrange "DP=1" "TP=2" "DP=2" "replicas=2" --out scale
    python measurements/scale.py --model A --model B --arrange "DP=1" "TP=2" --extra-args "--load-format dummy"
    python measurements/scale.py --model FOLDER --arrange "DP=1" "DP=2" --cpu --words --out scale

An arrangement is KEY=VALUE settings of the kit or VLLM_* variables, separated by spaces, and `replicas=N`: N
independent services on N ports, between which the load generator picks the one with the fewest calls in flight. It
takes TP x DP x replicas GPUs.
Each is started by start_rerank.sh, asked for the scores of the same 512 pairs, loaded by bench_rerank.py and stopped.
Efficiency = throughput / (GPUs x throughput of the model's first arrangement on one GPU). The latter is taken at as
many calls in flight per GPU if that was measured (--per-gpu), otherwise its best.

--start-all starts all arrangements at once on shared GPUs and loads one after the other, since starting takes most of
the time. They must fit into memory together: GPU_MEMORY_UTILIZATION, or --extra-args "--kv-cache-memory-bytes 4G".
--together loads arrangements on disjoint GPUs at the same time; they share CPU cores then ("beside" in the JSON).
Writes NAME.json with all that was found, NAME.csv as the tables in measurements/results/, NAME.md and NAME.logs.
Needs no network and nothing but what vLLM brings.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KIT))

from measurements import results
from measurements.scale_rows import N_DOCS, N_QUERIES, Arrangement, markdown, parity, parse_arrangement, table
from rerank_kit.benchmark.server_view import hardware, without_secrets
from rerank_kit.engine.machine import list_gpus
from rerank_kit.serving.health import request, samples
from rerank_kit.settings import FIELDS, get_config


class Cards:
    """The GPUs (on a CPU: numbers), handed out exclusively or shared."""

    def __init__(self, names: list[str], shared: bool):
        self.names, self.shared, self.free, self.changed = names, shared, list(names), threading.Condition()

    def take(self, n: int) -> list[str]:
        if n > len(self.names):
            raise RuntimeError(f"it needs {n} GPUs, there are {len(self.names)}")
        if self.shared:
            return self.names[:n]
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= n)
            taken, self.free = self.free[:n], self.free[n:]
            return taken

    def give(self, cards: list[str]) -> None:
        if not self.shared:
            with self.changed:
                self.free = sorted(self.free + cards, key=self.names.index)
                self.changed.notify_all()


class Run:
    """All arrangements of one call of this program."""

    def __init__(self, args: argparse.Namespace, cards: Cards):
        self.args, self.cards = args, cards
        self.out = Path(args.out).resolve()
        self.logs = self.out.with_suffix(".logs")
        self.measuring = threading.Lock()  # one load at a time, except with --together
        self.all_up = threading.Barrier(len(args.arrangements)) if args.start_all else None
        self.met = threading.Event()
        self.loaded: set[str] = set()  # arrangements under load now
        self.stopped = False
        self.children: set[subprocess.Popen] = set()

    def one(self, it: Arrangement) -> None:
        """Start, compare, load, stop. A failure is stored in it.error."""
        try:
            it.cards = self.cards.take(it.gpus)
            it.ports = free_ports(it.replicas)
            end, began = time.monotonic() + self.args.limit_s, time.monotonic()
            self.start(it, end)
            it.start_s = round(time.monotonic() - began, 1)
        except Exception as exc:  # the others go on
            it.error = f"{type(exc).__name__}: {exc}"
        if self.all_up:
            with suppress(threading.BrokenBarrierError):
                if self.all_up.wait(self.args.limit_s + 60) == 0 and self.args.meet:
                    self.meet(*self.args.meet.rsplit(":", 1))
                    self.met.set()
            if self.args.meet:
                self.met.wait(self.args.limit_s)
        try:
            if not it.error:
                with nullcontext() if self.args.together else self.measuring:
                    # Time spent waiting for the others is not counted.
                    self.load(it, time.monotonic() + self.args.limit_s if self.all_up else end)
        except Exception as exc:
            it.error = f"{type(exc).__name__}: {exc}"
        finally:
            with ThreadPoolExecutor(it.replicas) as pool:
                list(pool.map(lambda i: self.kit(it, i, "stop", 120), range(len(it.ports))))
            self.cards.give(it.cards)
            self.write()
            print(f"[scale] {it.name}: {it.error or 'done'}", file=sys.stderr, flush=True)

    def meet(self, folder: str, n: str) -> None:
        """Wait until n runs of this program have started all that they measure."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, self.out.name).touch()
        end = time.monotonic() + self.args.limit_s
        while len(list(Path(folder).iterdir())) < int(n) and time.monotonic() < end:
            time.sleep(0.2)

    def start(self, it: Arrangement, end: float) -> None:
        with ThreadPoolExecutor(it.replicas) as pool:
            for done in pool.map(lambda i: self.kit(it, i, "start", end - time.monotonic()), range(it.replicas)):
                if done.returncode:
                    raise RuntimeError(f"start ended with {done.returncode}: {done.stdout.strip()[-1500:]}")

    def settings(self, it: Arrangement, replica: int) -> dict[str, str]:
        args, left = self.args, len(it.cards) // it.replicas
        made = {
            "MODEL_PATH": it.model,
            "PORT": str(it.ports[replica]),
            "LOG_DIR": str(self.logs),
            "EXTRA_ARGS": args.extra_args,
            "RESTART": "no",
            "STOP_TIMEOUT_S": "5",
            # With --load-format dummy the weights are random, so scores mean nothing.
            "STARTUP_CHECK": "0" if "dummy" in args.extra_args else "1",
        }
        if not args.cpu:
            made["CUDA_VISIBLE_DEVICES"] = ",".join(it.cards[replica * left : (replica + 1) * left])
        return made | it.settings

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in FIELDS}
        return {**kept, "PYTHON": sys.executable, "KIT_ENV_FILE": os.devnull, **settings}

    def kit(self, it: Arrangement, replica: int, action: str, limit_s: float) -> subprocess.CompletedProcess:
        settings = self.settings(it, replica) | {"START_TIMEOUT_S": str(max(1, int(limit_s)))}
        return self.call(["sh", str(KIT / "start_rerank.sh"), action], self.environment(settings), limit_s + 30)

    def call(self, command: list[str], env: dict[str, str], limit_s: float) -> subprocess.CompletedProcess:
        if self.stopped and command[-1] != "stop":
            raise RuntimeError("interrupted")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, env=env, text=True, stdin=subprocess.DEVNULL, **pipes)
        self.children.add(child)
        try:
            out, _ = child.communicate(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            child.terminate()
            out, _ = child.communicate()
            out += f"\nended by this program after {limit_s:.0f} s"
        finally:
            self.children.discard(child)
        return subprocess.CompletedProcess(command, child.returncode, out)

    def load(self, it: Arrangement, end: float) -> None:
        """Scores of the known pairs from every replica, then bench_rerank.py for each length and all levels."""
        args = self.args
        self.loaded.add(it.name)
        configs = [self.config(it, i) for i in range(it.replicas)]
        it.scores = [pair_scores(cfg) for cfg in configs]
        before = engine_counts(configs)
        urls = ",".join(cfg.service_url for cfg in configs)
        for tokens, own_levels in args.tokens:
            levels = own_levels or ([n * it.gpus for n in args.per_gpu] if args.per_gpu else args.concurrency)
            file = self.logs / f"bench-{it.ports[0]}-{tokens}.json"
            command = [sys.executable, str(KIT / "bench_rerank.py"), "--endpoint", "rerank", "--base-url", urls]
            command += ["--concurrency", ",".join(map(str, levels)), "--seconds", f"{args.seconds:g}"]
            unit = "words" if args.words else "tokens"
            command += [
                "--docs",
                str(args.docs),
                f"--doc-{unit}",
                str(tokens),
                f"--query-{unit}",
                str(args.query_tokens),
            ]
            command += ["--json", str(file)] + (["--tokenizer", it.model] if not args.words else [])
            command += ["--processes", str(args.processes)] if args.processes else []
            it.beside = sorted({*it.beside, *self.loaded} - {it.name})
            done = self.call(command, self.environment(self.settings(it, 0)), end - time.monotonic())
            found = json.loads(file.read_text()) if file.exists() and file.stat().st_size else {"rows": []}
            for row in found["rows"]:
                it.rows.append(row | {"tokens": tokens})
            it.beside = sorted({*it.beside, *self.loaded} - {it.name})
            if done.returncode:
                it.error = f"bench_rerank.py ended with {done.returncode}: {done.stdout.strip()[-800:]}"
                break
        after = engine_counts(configs)
        it.engines = {name: after[name] - before.get(name, 0.0) for name in after}
        self.loaded.discard(it.name)

    def config(self, it: Arrangement, replica: int):
        settings = self.settings(it, replica)
        return get_config(os.devnull, **{FIELDS[k].name: v for k, v in settings.items() if k in FIELDS})

    def write(self) -> None:
        """Results so far; written after each step, so a run that is cut short keeps them."""
        rows = table(self.args.arrangements)
        about = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": without_secrets(["python", "measurements/scale.py", *self.args.argv]),
            "vllm": version("vllm"),
            "hardware": hardware(),
            "gpus": list(list_gpus()) if not self.args.cpu else [],
            "cores": len(os.sched_getaffinity(0)),
            "documents_per_call": self.args.docs,
            "query_tokens": self.args.query_tokens,
            "lengths_in": "words" if self.args.words else "tokens",
            "seconds": self.args.seconds,
            "parity": f"largest and mean difference over the same {N_QUERIES * N_DOCS} pairs to the first arrangement "
            "of the model" + ("; dummy weights: TP > 1 has others" if "dummy" in self.args.extra_args else ""),
        }
        found = [
            {
                "model": Path(it.model).name,
                "arrangement": it.text,
                "gpus": it.gpus,
                "cards": it.cards,
                "start_s": it.start_s,
                "error": it.error,
                "pairs_by_engine": it.engines,
                "beside": it.beside,
                "parity": parity(it, self.args.arrangements),
                "rows": it.rows,
            }
            for it in self.args.arrangements
        ]
        raw, scratch = {**about, "table": rows, "arrangements": found}, self.out.with_suffix(".part")
        scratch.write_text(json.dumps(raw, indent=1))
        scratch.replace(self.out.with_suffix(".json"))
        results.write(self.out.with_suffix(".csv"), *results.compact(raw))
        self.out.with_suffix(".md").write_text(markdown(rows))


def free_ports(n: int) -> list[int]:
    """Free ports of this host; every caller gets different ones."""
    held = [socket.socket() for _ in range(n)]
    with _ports_lock:
        ports = []
        for one in held:
            while True:
                port = random.SystemRandom().randrange(20000, 32000)  # below the ephemeral port range
                try:
                    if port not in _ports:
                        one.bind(("127.0.0.1", port))
                        break
                except OSError:
                    continue
            _ports.add(port)
            ports.append(port)
            one.close()
    return ports


_ports: set[int] = set()
_ports_lock = threading.Lock()


def known_pairs() -> list[tuple[str, list[str]]]:
    """The same 512 pairs for every arrangement: queries and documents of 5 to 200 words."""
    rng = random.Random(8)
    words = [f"{a}{b}" for a in ("ca", "do", "en", "mi", "pro", "st") for b in ("pital", "main", "gine", "nute", "ate")]
    words += [
        "the",
        "of",
        "capital",
        "China",
        "gravity",
        "的",
        "北京",
        "搜索",
        "résumé",
        "3.14",
        "100%",
        "(a)",
        "[b]",
        "{c}",
    ]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [(text(3, 20), [text(5, 200) for _ in range(N_DOCS)]) for _ in range(N_QUERIES)]


def pair_scores(cfg) -> list[float]:
    """Scores of the known pairs, several calls in flight, so that every engine of the service has some."""

    def one(pair: tuple[str, list[str]]) -> list[float]:
        body = {"model": cfg.served_model_name, "query": pair[0], "documents": pair[1]}
        status, data = request(cfg, "POST", "/v1/rerank", body, 300.0)
        if status != 200:
            raise RuntimeError(f"/v1/rerank answers {status}: {data[:300].decode('utf-8', 'replace')}")
        found = {item["index"]: item["relevance_score"] for item in json.loads(data)["results"]}
        return [found[i] for i in range(N_DOCS)]

    with ThreadPoolExecutor(8) as pool:
        return [score for scores in pool.map(one, known_pairs()) for score in scores]


def engine_counts(configs: list) -> dict[str, float]:
    """{service/engine: pairs finished so far}."""
    out = {}
    for i, cfg in enumerate(configs):
        for metric, labels, value in samples(cfg):
            if metric == "vllm:request_success_total":
                engine = re.search(r'engine="(\d+)"', labels)
                name = f"{i}/{engine[1] if engine else '0'}"
                out[name] = out.get(name, 0.0) + value
    return out


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    add("--model", action="append", required=True, help="folder of a checkpoint; repeat it for several models")
    add("--arrange", nargs="+", required=True, metavar="TEXT", help='e.g. "DP=1" "TP=2" "DP=2" "replicas=2"')

    def lengths(text: str) -> list[tuple[int, list[int] | None]]:
        parts = [part.partition(":") for part in text.split(",")]
        return [(int(n), [int(level) for level in levels.split("/")] if levels else None) for n, _, levels in parts]

    add(
        "--tokens",
        type=lengths,
        default=[(128, None)],
        help="tokens per document, e.g. 128,512 (default: 128); 512:16/64 sets the calls in flight for one length",
    )
    add("--query-tokens", type=int, default=16)
    add("--words", action="store_true", help="lengths in words, for tokenizers without English words (test models)")
    add("--docs", type=int, default=32, help="documents a call")
    add("--concurrency", type=numbers, default=[16, 64], help="calls in flight (default: 16,64)")
    add("--per-gpu", type=numbers, help="calls in flight per GPU of the arrangement, instead of --concurrency")
    add("--seconds", type=float, default=8.0, help="length of a level")
    add("--processes", type=int, help="client processes; default: as bench_rerank.py chooses")
    add("--extra-args", default="", help="EXTRA_ARGS of every service")
    add("--limit-s", type=float, default=420, help="time limit of one arrangement from start to stop, in seconds")
    add("--gpus", help="GPUs to use, e.g. 0,1 (default: all)")
    add("--cpu", action="store_true", help="use the CPU build; arrangements count GPUs as if there were any")
    add("--start-all", action="store_true", help="start all at once on shared GPUs, load one after the other")
    add("--meet", metavar="FOLDER:N", help="with --start-all: load only when N runs with this folder have started all")
    add("--together", action="store_true", help="load arrangements on disjoint GPUs at the same time")
    add("--out", default="scale", metavar="NAME", help="of the files and the folder that are written")
    args = parser.parse_args(argv)
    args.argv = argv
    args.model = [str(Path(model).resolve()) for model in args.model]
    try:
        args.arrangements = [parse_arrangement(model, text) for model in args.model for text in args.arrange]
    except ValueError as exc:
        parser.error(str(exc))
    if args.start_all and args.together:
        parser.error("--start-all shares GPUs, --together does not: choose one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    for key in FIELDS:  # the services do not inherit this shell's settings
        os.environ.pop(key, None)
    n_cards = max(it.gpus for it in args.arrangements) if args.cpu else len(list_gpus())
    names = args.gpus.split(",") if args.gpus else [str(i) for i in range(n_cards)]
    run = Run(args, Cards(names, shared=args.start_all))
    run.logs.mkdir(parents=True, exist_ok=True)

    def stop(*_):
        run.stopped = True
        for child in list(run.children):
            child.terminate()  # start and bench end, then every service is stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    workers = len(args.arrangements) if args.start_all or args.together else 1
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run.one, args.arrangements))
    run.write()
    print(markdown(table(args.arrangements)), end="")
    return 1 if any(it.error for it in args.arrangements) else 0


if __name__ == "__main__":
    sys.exit(main())
