"""Where does the GPU's time go? Shares by kind of kernel while the engine scores, as a table.

    MAX_NUM_BATCHED_TOKENS=24576 python measurements/kernels.py --model FOLDER [--pairs 4096] [--csv FILE]

One engine in this process scores pre-tokenized pairs; torch.profiler records its kernels, not what launches them.
"gemm" is the time of the model's matrix products. gemm share x busy share is the part of their ceiling that one engine
reaches. "busy" is the time of all kernels over the wall time. One engine leaves gaps between its steps; several engines
on one GPU fill them. Needs a GPU.
"""

import argparse
import os
import re
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT), str(KIT / "tests" / "stand_ins")]

from pair_texts import make_pairs

from measurements import results
from rerank_kit.benchmark.server_view import hardware

KINDS = {  # in this order: a fused kernel's name holds the names of what is fused
    "kv cache": r"reshape_and_cache|kv_cache",
    "norm, rope, activation (fused by Inductor)": r"triton",
    "attention": r"flash|fmha|attention|attn",
    "gemm": r"gemm|nvjet|cutlass|xmma|cublas|wgmma",
    "copies": r"memcpy|memset",
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.I)), "other")


def shares(kernels: dict[str, float], seconds: float) -> dict:
    """{kernel: seconds on the GPU} -> busy share of the time, and each kind's share of the kernels."""
    total = sum(kernels.values())
    kinds: dict[str, float] = {}
    for name, spent in kernels.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent
    return {
        "busy": total / seconds,
        "kinds": {kind: spent / total for kind, spent in sorted(kinds.items(), key=lambda pair: -pair[1])},
        "longest": {name[:120]: spent / total for name, spent in sorted(kernels.items(), key=lambda p: -p[1])[:12]},
    }


def table(found: dict) -> tuple[dict, list[results.Row]]:
    """(head, a row for each kind and for each of the longest kernels) for measurements/results/."""
    rows = [{"kind": kind, "kernel": "all", "share": share} for kind, share in found["kinds"].items()]
    rows += [{"kind": kind_of(name), "kernel": name[:60], "share": share} for name, share in found["longest"].items()]
    return {name: value for name, value in found.items() if name not in ("kinds", "longest")}, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=4096)
    parser.add_argument("--doc-tokens", type=int, default=128)
    parser.add_argument("--docs-per-query", type=int, default=32)
    parser.add_argument("--csv", type=Path, help="write the shares here too, as in measurements/results/")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # only kernels of this process are recorded
    from torch.profiler import ProfilerActivity, profile

    from rerank_kit.engine.plan import plan_engine
    from rerank_kit.models.pair import Pair
    from rerank_kit.offline.reranker import OfflineReranker
    from rerank_kit.settings import get_config

    plan = plan_engine(get_config(), args.model)
    if plan.machine.is_cpu:
        parser.error("this machine has no GPU")

    with OfflineReranker(plan) as reranker:

        def batch(seed: int):
            texts = make_pairs(args.model / "tokenizer.json", args.pairs, args.doc_tokens, args.docs_per_query, seed)
            return reranker.prepare([Pair(*text) for text in texts])

        prepared = [batch(seed) for seed in (1, 2, 3)]
        list(reranker.stream(iter([(None, prepared[0])])))  # compiles and warms up
        began = time.perf_counter()
        list(reranker.stream(iter([(None, prepared[1])])))
        unprofiled = time.perf_counter() - began
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            began = time.perf_counter()
            list(reranker.stream(iter([(None, prepared[2])])))
            seconds = time.perf_counter() - began
        kernels = {
            one.key: one.self_device_time_total / 1e6 for one in profiler.key_averages() if one.self_device_time_total
        }
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "measurements/kernels.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "vllm": plan.machine.vllm_version,
        "torch": version("torch"),
        "model": args.model.name,
        "doc_tokens": args.doc_tokens,
        "pairs": args.pairs,
        "engine": results.settings({k: v for k, v in plan.engine.items() if k != "model"}),
        "pairs/s": args.pairs / unprofiled,
        "pairs/s_profiled": args.pairs / seconds,
        **shares(kernels, seconds),
    }
    speed = f"{found['pairs/s']:.0f} pairs/s ({found['pairs/s_profiled']:.0f} while recorded)"
    print(f"{speed}, GPU busy {found['busy']:.0%}")
    for kind, share in found["kinds"].items():
        print(f"{share:7.1%}  {kind}")
    if args.csv:
        results.write(args.csv, *table(found))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # vLLM's teardown can abort after all work is done
