"""Throughput of offline scoring from file to file, with the real engine and with one that takes no time.

python measurements/cold.py --model FOLDER [--pairs 24000] [--doc-tokens 128] [--runs 3] [--csv FILE]

Two rows. "end_to_end": score_shards() with the real engine, or with the several engines that vllm_usage.py takes for so
many pairs; every run has its own documents, one engine's prefix cache is emptied in between, starting is not counted.
"host": the same with an engine core that answers at once with a made-up score, after the requests were encoded and the
outputs decoded as for the real one: what the Python side can feed.
Runs on CPU and GPU. It measures the checkout that it lies in.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from importlib.metadata import version
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests" / "stand_ins")]

from pair_texts import make_pairs

from measurements import results
from rerank_kit.benchmark.server_view import hardware
from rerank_kit.engine.plan import plan_engine
from rerank_kit.offline.files import Shard, score_shards
from rerank_kit.offline.pool import RerankerPool
from rerank_kit.offline.program import opened_for
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import get_config

KINDS = ("end_to_end", "host")
STEP = 1024  # outputs that the engine without cost gives at a time, as an H100 does


class FreeEngine:
    """Replaces the engine core of a loaded vllm.LLM inside `with`; every request is answered at once."""

    def __init__(self, engine_core, size: int):
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.core, self.pending = engine_core, deque()
        self.encoder, self.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
        self.outputs, self.output, self.stop = EngineCoreOutputs, EngineCoreOutput, FinishReason.STOP
        self.size = size
        self.n_bytes = 0

    def add_request(self, request) -> None:
        self.n_bytes += sum(map(len, self.encoder.encode(request)))
        self.pending.append(request.request_id)

    def get_output(self):
        import torch

        ids = [self.pending.popleft() for _ in range(min(STEP, len(self.pending)))]
        if not ids:
            raise RuntimeError("asked for outputs without any request")
        scores = torch.full((len(ids), self.size), 0.5)
        outputs = [
            self.output(i, [], pooling_output=row, finish_reason=self.stop) for i, row in zip(ids, scores, strict=True)
        ]
        return self.decoder.decode(self.encoder.encode(self.outputs(outputs=outputs)))

    def __enter__(self):
        for name in ("add_request", "get_output"):
            setattr(self.core, name, getattr(self, name))
        return self

    def __exit__(self, *_):
        for name in ("add_request", "get_output"):
            delattr(self.core, name)


def write_pairs(path: Path, args, n_pairs: int, seed: int) -> Path:
    pairs = make_pairs(args.model / "tokenizer.json", n_pairs, args.doc_tokens, args.docs_per_query, seed)
    rows = (json.dumps({"query": q, "document": d, "id": i}, ensure_ascii=False) for i, (q, d) in enumerate(pairs))
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return path


def measure(reranker, source: Path, n_pairs: int) -> dict:
    """One run over a file: pairs/s, and microseconds a pair of CPU in this process (all threads)."""
    output = source.with_suffix(".out")
    output.unlink(missing_ok=True)
    began, cpu = time.perf_counter(), time.process_time()
    scored, failed, _ = score_shards(reranker, [Shard(source, output, 0, n_pairs)])
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    if (scored, failed) != (n_pairs, 0):
        raise SystemExit(f"{scored} scored, {failed} failed of {n_pairs}")
    return {"pairs_s": n_pairs / wall, "cpu_us_per_pair": cpu / n_pairs * 1e6}


def summary(runs: list[dict]) -> dict:
    speeds = [run["pairs_s"] for run in runs]
    return {
        "pairs_s": statistics.median(speeds),
        "pairs_s_min": min(speeds),
        "pairs_s_max": max(speeds),
        "cpu_us_per_pair": statistics.median(run["cpu_us_per_pair"] for run in runs),
        "runs": runs,
    }


def table(result: dict) -> tuple[dict, list[results.Row]]:
    """(head, a row for each run) for measurements/results/."""
    rows = []
    for kind in KINDS:
        for number, run in enumerate(result[kind]["runs"] if kind in result else [], 1):
            rows.append({"kind": kind, "run": number, "pairs": result[kind]["pairs"], **run})
    return {name: value for name, value in result.items() if name not in KINDS}, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--pairs", type=int, default=24000, help="pairs of one run")
    parser.add_argument("--host-pairs", type=int, default=24000, help="pairs of one run with the engine of no cost")
    parser.add_argument("--doc-tokens", type=int, default=128)
    parser.add_argument("--docs-per-query", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--host-only", action="store_true", help="leave the real engine out")
    parser.add_argument("--csv", type=Path, help="write the runs here too, as in measurements/results/")
    args = parser.parse_args()
    args.model = args.model.resolve()
    plan = plan_engine(get_config(), args.model)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "measurements/cold.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "cores": len(plan.machine.cores),
        "vllm": plan.machine.vllm_version,
        "torch": version("torch"),
        "python": platform.python_version(),
        "model": args.model.name,
        "doc_tokens": args.doc_tokens,
        "docs_per_query": args.docs_per_query,
    }
    began = time.perf_counter()
    with opened_for(plan, args.pairs, str(args.model)) as reranker, tempfile.TemporaryDirectory() as folder:
        result["start_s"] = round(time.perf_counter() - began, 1)
        plan, several = reranker.plan, isinstance(reranker, RerankerPool)
        result["engines"] = plan.engines if several else 1
        result["engine"] = results.settings({k: v for k, v in plan.engine.items() if k != "model"})
        if several:  # each has its own process: this one has neither their caches nor their front ends
            kinds: tuple[str, ...] = KINDS[:1]
        else:
            kinds = KINDS[1:] if args.host_only else KINDS
        size = plan.checkpoint.config.get("hidden_size", 1) if plan.profile.reference == "embedding" else 1
        for kind in kinds:
            n_pairs = args.host_pairs if kind == "host" else args.pairs
            runs = []
            for number in range(args.runs + 1):  # the first warms up
                n = n_pairs if number else min(n_pairs, 2048)
                source = write_pairs(Path(folder) / "in.jsonl", args, n, seed=number)
                if kind == "host":
                    with FreeEngine(reranker.llm.llm_engine.engine_core, size):
                        runs.append(measure(reranker, source, n))
                else:
                    if isinstance(reranker, OfflineReranker):
                        reranker.llm.reset_prefix_cache()
                    runs.append(measure(reranker, source, n))
            result[kind] = {"pairs": n_pairs, **summary(runs[1:])}
            row = result[kind]
            print(
                f"{kind}: {row['pairs_s']:.0f} pairs/s ({row['pairs_s_min']:.0f} to {row['pairs_s_max']:.0f}), "
                f"{row['cpu_us_per_pair']:.0f} us of this process's CPU a pair",
                flush=True,
            )
    if args.csv:
        results.write(args.csv, *table(result))
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":  # vLLM's workers import this file again
    code = main()
    sys.stdout.flush()
    os._exit(code)  # as offline.program.leave(): the interpreter's teardown can abort with vLLM 0.26
