"""What vllm_usage.py and vllm_usage_tiny.py share: arguments, the built-in example, files, the end of the process."""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from rerank_kit.engine.plan import Plan, plan_engine
from rerank_kit.models.pair import Pair
from rerank_kit.offline.files import Result, find_shard, score_shards, shard_files
from rerank_kit.offline.pool import RerankerPool
from rerank_kit.offline.reranker import OfflineReranker
from rerank_kit.settings import ConfigError

MANY_PAIRS = 20_000  # from here on several engines gain more than their start costs
EXAMPLE_QUERY = "What is the capital of China?"
EXAMPLE_DOCUMENTS = (
    "Gravity attracts bodies.",
    "The capital of China is Beijing.",
    "Shanghai is a large city in China.",
    "中国的首都是北京。",
)


def example_pairs() -> list[Pair]:
    return [Pair(EXAMPLE_QUERY, document) for document in EXAMPLE_DOCUMENTS]


def print_example(plan: Plan, results: list[Result]) -> int:
    """Print the built-in example's scores, best first: 0 when every document has one, else 1."""
    print(f"model: {plan.checkpoint.path}\nprofile: {plan.profile.name}\nquery: {EXAMPLE_QUERY}")
    failed = [index for index, result in enumerate(results) if result.score is None]
    scored = [(-result.score, index) for index, result in enumerate(results) if result.score is not None]
    for minus_score, index in sorted(scored):
        print(f"- score={-minus_score:.4f} | idx={index} | doc={EXAMPLE_DOCUMENTS[index]}")
    for index in failed:
        print(f"- error={results[index].error} | idx={index} | doc={EXAMPLE_DOCUMENTS[index]}")
    return 1 if failed else 0


# Warnings of libraries that a user of the kit can do nothing about; a setting of the user's own stays.
QUIET = {
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
}


def tell_loading(plan: Plan) -> None:
    """Say that the model is being loaded, which takes a minute, and keep the libraries' warnings out of the way."""
    print(f"loading {plan.checkpoint.path} ({plan.profile.name}): usually half a minute to two", file=sys.stderr)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)  # the engine is a process of its own
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|vllm|transformers)\b")


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="folder or hub id; default: the configured one")
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        metavar="PATH",
        help="pairs: *.jsonl, *.csv, *.tsv or *.parquet (docs/bulk.md); or a folder of such",
    )
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="scores, one JSON object a line; or a folder. An existing output is continued",
    )
    add("--shard", metavar="I/N", help="score every N-th file from the I-th, as one of N processes or hosts")
    return parser


def parse_part(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise ConfigError(f"--shard {text!r} is not I/N with 1 <= I <= N")
    return int(first), int(second)


def opened_for(plan: Plan, n_pairs: int, model: str | None) -> OfflineReranker | RerankerPool:
    """The engine or the engines for a run over this many pairs."""
    if n_pairs >= MANY_PAIRS or plan.cfg.engines_per_gpu:
        several = plan_engine(plan.cfg, model, plan.machine, several=True)
        if several.engines > 1:
            return RerankerPool(several)
    return OfflineReranker(plan)


def run_file(args: argparse.Namespace, plan: Plan, model: str | None = None) -> int:
    """--input / --output, a file or a folder: 0 when every line has a score, 1 when some have none."""
    if args.output is None or args.output.resolve() == args.input.resolve():
        raise ConfigError("--input needs --output, another file than the input")
    broken, shards = [], []
    if args.input.is_dir():
        for source, output in shard_files(args.input, args.output, parse_part(args.shard or "1/1")):
            try:
                shards.append(find_shard(source, output))
            except ConfigError as exc:
                broken.append(str(exc))
                print(f"[WARN] {exc}", file=sys.stderr)
    elif args.shard:
        raise ConfigError(f"--shard needs a folder, and {args.input} is not one")
    else:
        shards = [find_shard(args.input, args.output)]
    skip, total, failed_before = (sum(getattr(s, name) for s in shards) for name in ("skip", "total", "failed"))
    todo = [s for s in shards if not s.done]
    if not todo:
        lacks = f", {len(broken)} files not done" if broken else ""
        print(f"nothing to do: {args.output} has {total} lines, {failed_before} without a score{lacks}")
        return 1 if failed_before or broken else 0
    if skip:
        print(f"going on after line {skip} of {total}", file=sys.stderr)
    tell_loading(plan)
    with opened_for(plan, total - skip, model) as reranker:
        began = time.perf_counter()
        scored, failed, more = score_shards(reranker, todo)
        speed = f"{scored / (time.perf_counter() - began):.0f} pairs/s"
    broken += more
    files = f", {len(broken)} of {len(shards) + len(broken) - len(more)} files not done" if broken else ""
    before = f"{skip} done before" + (f" ({failed_before} of them without a score)" if failed_before else "")
    print(f"{scored} scored ({speed}), {failed} without a score, {before}{files} -> {args.output}")
    return 1 if failed or failed_before or broken else 0


def leave(code: int) -> None:
    """End the process with this exit code.

    Not by sys.exit() once vLLM is loaded: the interpreter's teardown can abort ("terminate called without an active
    exception", exit code 134) after all work is done; seen with 0.26 on an H100 and, rarely, with 0.32 on a CPU.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "vllm" in sys.modules:
        os._exit(code)
    sys.exit(code)
