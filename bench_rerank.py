"""Benchmark of the running service: `rerank` and `score` under load, and how well it ranks.

    python bench_rerank.py                                  # closed loop, 1 to 150 calls in flight
    python bench_rerank.py --endpoint rerank --rate 5,10    # open loop, calls due at random times
    python bench_rerank.py --saturate                       # how many calls in flight until throughput stops growing
    python bench_rerank.py --slo p95=500ms                  # the highest rate at which 95 % of the calls take 500 ms
    python bench_rerank.py --seconds 20 --runs 5 --json out.json --html out.html
    python bench_rerank.py --compare before.json after.json --fail-over 5
    python bench_rerank.py --quality judgements.jsonl       # how well it ranks (docs/quality.md); --quality --help

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

import asyncio
import resource
import sys

from rerank_kit.settings import not_installed

try:
    from rerank_kit.benchmark.arguments import parse_args
    from rerank_kit.benchmark.program import begin, run, run_compare
    from rerank_kit.benchmark.tune import tune
except ModuleNotFoundError as exc:
    if __name__ != "__main__":
        raise
    sys.exit(not_installed(exc, "bench_rerank.py", "bench"))


def main(argv: list[str] | None = None) -> int:
    """0 done; 1 no server, no call succeeded, or a regression; 2 usage; 130 Ctrl-C (what was measured is printed)."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--quality" for word in argv):
        from rerank_kit.benchmark.quality.program import main as quality  # a load test needs none of it

        return quality(argv)
    args, api_key, connect_timeout_s = parse_args(argv)
    if args.compare:
        return run_compare(args.compare, args.fail_over, args.html)
    # A socket per call in flight: the usual soft limit of 1024 files is too low for an open loop that queues.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # -1 = no limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard < 65536 else 65536, hard))
    if args.tune:
        return tune(args, begin)
    try:
        return asyncio.run(run(args, api_key, connect_timeout_s))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    from rerank_kit.offline.program import leave

    leave(main())  # --offline loads vLLM
