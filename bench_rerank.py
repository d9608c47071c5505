"""Benchmark of the running service: `rerank` and `score` under load.

    python bench_rerank.py                                  # closed loop, 1 to 150 calls in flight
    python bench_rerank.py --endpoint rerank --rate 5,10    # open loop, calls due at random times
    python bench_rerank.py --saturate                       # how many calls in flight until throughput stops growing
    python bench_rerank.py --slo p95=500ms                  # the highest rate at which 95 % of the calls take 500 ms
    python bench_rerank.py --seconds 20 --runs 5 --json out.json --html out.html
    python bench_rerank.py --compare before.json after.json --fail-over 5

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

import argparse
import asyncio
import datetime
import itertools
import json
import math
import platform
import random
import re
import resource
import sys
from pathlib import Path

import aiohttp

from bench_levels import Interrupted, Rows, check, level_of, saturate, search_slo, texts_of
from bench_page import compare_page
from bench_report import COLUMNS, compare, cost_lines, table_line
from bench_server import (
    ask_server,
    hardware,
    is_local,
    model_config,
    server_flags,
    server_processes,
    without_secrets,
)
from bench_texts import Lengths
from bench_tune import NAMES, TOLERANCE, budget, knob_names, tune
from bench_workload import Bench, Level, say
from env_utils import get_config

TUNE_CONCURRENCY = 16  # calls in flight, unless --concurrency


async def describe(args: argparse.Namespace, bench: Bench, answers: dict, tokens_per_pair: float | None) -> dict:
    """Everything needed to repeat the run, by name: header of the table and of the JSON file."""
    load = "closed loop, latency from sending"
    if args.rate or args.slo:
        load = f"open loop, {'constant' if args.constant else 'Poisson'} arrivals, latency from the due time"
    size = f"{args.seconds:g} s" if args.seconds else f"{args.requests or 'at least 100'} calls"
    if args.slo and not args.seconds:
        size = "10 s or more"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": without_secrets(["python", "bench_rerank.py", *args.argv]),
        "server": without_secrets([args.base_url]),
        **answers,
        "model": bench.model,
        "services": len(bench.base_urls),
        "server_flags": server_flags(bench.base_url),
        "hardware": hardware() + ("" if is_local(args.base_url) else " (this client's; the server is another host)"),
        "client": f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}, retries off",
        "timeout_s": args.timeout_s,
        "load": f"{load}, {size} a level after the warm-up",
        "texts": bench.texts.about,
        "tokens_per_pair": tokens_per_pair,
        "seed": args.seed,
    }


# --- the program ---


def levels_of(args: argparse.Namespace) -> list[Level]:
    """The rows to make: per run, per endpoint, per level. Runs come one after the other: drift reaches all levels."""
    mode, levels = ("open", args.rate) if args.rate else ("closed", args.concurrency)
    wanted = itertools.product(range(1, args.runs + 1), args.endpoint, levels)
    return [level_of(args, endpoint, mode, level, run=run) for run, endpoint, level in wanted]


async def begin(args: argparse.Namespace, bench: Bench) -> Rows:
    """Ask the server, make the texts, print the header. Raises ValueError, OSError: texts; RuntimeError: server."""
    answers = await ask_server(bench)
    bench.texts = texts_of(args, answers["model_root"])
    tokens_per_pair = await check(bench, args.endpoint)
    for base_url in bench.base_urls:
        bench.server_pids |= server_processes(base_url)
    about = await describe(args, bench, answers, tokens_per_pair)
    for name, value in about.items():
        print(f"# {name}: {'unknown' if value is None else value}")
    print(table_line({name: name for name in COLUMNS}), flush=True)
    about |= {"error_texts": bench.error_texts, "findings": []}
    rows = Rows(args, bench, about)
    rows.model, rows.gpu = model_config(answers["model_root"]), about["hardware"]
    return rows


async def run(args: argparse.Namespace, api_key: str | None, connect_timeout_s: float) -> int:
    """Check the server, make every row, write the files. Returns the exit code."""
    async with Bench(args.base_url, args.model, None, api_key, args.timeout_s, connect_timeout_s) as bench:
        try:
            rows = await begin(args, bench)
        except (ValueError, OSError) as exc:
            say(f"[ERR] {exc}")
            return 2
        except RuntimeError as exc:
            say(f"[ERR] {exc}")
            return 1
        about = rows.about
        try:
            if args.saturate or args.slo:
                for endpoint in args.endpoint:
                    about["findings"].append(await (saturate if args.saturate else search_slo)(rows, endpoint))
            else:
                for level in levels_of(args):
                    await rows.make(level)
        except Interrupted:
            return 130
        except RuntimeError as exc:
            say(f"[ERR] {exc}")
            return 1
    for row in rows.rows:
        about["findings"].append(f"{row['endpoint']} {row['mode']} {row['level']:g}: {row['bound']}: {row['verdict']}")
    if args.price_per_hour or args.target_pairs_s:
        about["findings"] += cost_lines(about, rows.rows, args.price_per_hour, args.target_pairs_s)
    for text in about["findings"]:
        print(f"# {text}")
    written = rows.write()
    return 0 if written and any(row["ok"] for row in rows.rows) else 1


def run_compare(names: list[str], fail_over: float | None, page: str | None = None) -> int:
    """Print how each file differs from the first. 1 = a regression of more than fail_over %, 2 = cannot be told."""
    try:
        outs = [json.loads(Path(name).read_text("utf-8")) for name in names]
        code, shown = 0, []
        print("# intervals: 95 %, Welch's t over the runs of a level, in % of the first file's mean")
        for name, out in zip(names[1:], outs[1:], strict=True):
            print(f"# {names[0]} -> {name}")
            lines, worse, untold = compare(outs[0], out, fail_over)
            print("\n".join(lines))
            shown += [f"{names[0]} -> {name}", *lines]
            if fail_over is not None and untold:
                say(f"[ERR] --fail-over cannot judge {untold}")
                code = code or 2
            for text in worse:
                say(f"[ERR] regression of more than {fail_over:g} %: {text}")
            code = 1 if worse else code
        if page:
            Path(page).write_text(compare_page(dict(zip(names, outs, strict=True)), shown), "utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        say(f"[ERR] --compare: not a file that --json wrote: {exc!r}")
        return 2
    return code


def numbers(kind: type, low: float, many: bool = False):
    """argparse type: one number, or several with commas; a bad one is named."""

    def parse(text: str):
        try:
            values = [kind(part) for part in (text.split(",") if many else [text])]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'integer' if kind is int else 'numeric'}") from None
        if not all(low <= value < math.inf for value in values):
            raise argparse.ArgumentTypeError(f"{text!r} is out of range: {low:g} or more is allowed")
        return values if many else values[0]

    return parse


def lengths(text: str) -> str:
    """argparse type: a text that Lengths can parse."""
    try:
        return Lengths.parse(text).spec
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def slo(text: str) -> tuple[int, float]:
    """argparse type: `p95=500ms` or `p99=2s` as (95, 500.0)."""
    found = re.fullmatch(r"p(50|90|95|99)=(\d+(?:\.\d+)?)(ms|s)", text)
    if not found or not float(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an SLO: write p95=500ms (p50, p90, p95 or p99; ms or s)")
    return int(found[1]), float(found[2]) * (1000 if found[3] == "s" else 1)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, str | None, float]:
    """Arguments over configuration; exits 2 for what cannot be used. Returns (args, API key, connect timeout in s)."""
    parser = argparse.ArgumentParser(description="Load test of the running rerank service.", allow_abbrev=False)
    add = parser.add_argument
    load, size, doc, query, repeat = (parser.add_mutually_exclusive_group() for _ in range(5))
    # fmt: off
    add("--endpoint", default="rerank,score", choices=["rerank", "score", "rerank,score"], help="default: %(default)s")
    load.add_argument("--concurrency", type=numbers(int, 1, True), default=[1, 16, 50, 100, 150],
                      help="closed loop: calls in flight (default: 1,16,50,100,150)")
    load.add_argument("--rate", type=numbers(float, 0.001, True), help="open loop: calls a second, e.g. 5,10")
    add("--tune", nargs="?", const=list(NAMES), type=knob_names, metavar="NAMES",
        help="restart the service of this host with other settings and find better ones (docs/benchmarking.md)")
    add("--budget", type=budget, default=1800.0, metavar="30m", help="with --tune: time to take (default: 30m)")
    add("--score-tolerance", type=numbers(float, 0), default=TOLERANCE,
        help="with --tune: reject settings that change a score by more (default: %(default)s)")
    load.add_argument("--saturate", action="store_true",
                      help="closed loop: double the calls in flight until throughput stops growing")
    load.add_argument("--slo", type=slo, metavar="p95=500ms",
                      help="open loop: find the highest rate at which p50, p90, p95 or p99 stays below")
    add("--constant", action="store_true", help="with --rate or --slo: even distances, not Poisson")
    size.add_argument("--requests", type=numbers(int, 1), help="calls a level (default: 100, 3 rounds or 10 s)")
    size.add_argument("--seconds", type=numbers(float, 0.001), help="length of a level")
    add("--warmup", type=numbers(int, 0), help="calls before the window (default: 5, one round or 1 s)")
    add("--runs", type=numbers(int, 1), default=1, help="make all levels so often, for --compare (default: 1)")
    add("--processes", type=numbers(int, 1), help="client processes (default: 1, more where the client is the limit)")
    add("--docs", type=numbers(int, 1), help="documents a call (default: 32)")
    doc.add_argument("--doc-words", type=lengths, default="100",
                     help="words a document: 100, 64-512 (uniform) or lognormal:MEAN,SIGMA (default: %(default)s)")
    doc.add_argument("--doc-tokens", type=lengths, help="the same in tokens")
    query.add_argument("--query-words", type=lengths, default="10", help="words a query (default: %(default)s)")
    query.add_argument("--query-tokens", type=lengths, help="the same in tokens")
    add("--tokenizer", metavar="FOLDER", help="for lengths in tokens (default: the served model's folder)")
    add("--input", metavar="FILE", help='your own calls, JSONL: {"query": "...", "documents": ["...", ...]}')
    add("--seed", type=numbers(int, 0), help="of texts and arrivals (default: a new one, printed)")
    repeat.add_argument("--repeat", nargs="?", const="all", choices=["all", "query"],
        help="measure the prefix cache: all calls are the same, or share the query")
    repeat.add_argument("--shared-query", action="store_true", help="the same as --repeat query")
    add("--base-url", help="default: BASE_URL, else HOST and PORT; of several (commas) a call takes the least busy one")
    add("--model", help="default: SERVED_MODEL_NAME")
    add("--timeout-s", help="seconds to wait for an answer (default: TIMEOUT_S)")
    add("--json", metavar="FILE", help="write header and rows")
    add("--csv", metavar="FILE", help="write rows")
    add("--html", metavar="FILE", help="write one page with charts; with --compare: plots of all files")
    add("--price-per-hour", type=numbers(float, 0), help="of the service: gives the cost of a million pairs")
    add("--target-pairs-s", type=numbers(float, 0.001, True), help="how many GPUs these rates need, e.g. 1000,5000")
    add("--compare", nargs="+", metavar="FILE", help="measure nothing: compare files of --json with the first one")
    add("--fail-over", type=numbers(float, 0), metavar="PERCENT", help="with --compare: exit 1 on a worse change")
    # fmt: on
    args = parser.parse_args(argv)
    args.endpoint = args.endpoint.split(",")
    words = {w.partition("=")[0] for w in argv}
    args.repeat = "query" if args.shared_query else args.repeat
    texts = words & {
        "--docs",
        "--doc-words",
        "--doc-tokens",
        "--query-words",
        "--query-tokens",
        "--repeat",
        "--shared-query",
    }
    given = "--concurrency" in words
    unused = words & {"--json", "--csv", "--price-per-hour", "--target-pairs-s", "--tune", "--saturate", "--slo"}
    for wrong, text in (
        (args.constant and not (args.rate or args.slo), "--constant: needs --rate or --slo"),
        (args.input and texts, f"{min(texts, default='')}: not with --input, which brings its own texts"),
        (args.runs > 1 and (args.slo or args.saturate), "--runs: not with a search"),
        (args.tokenizer and not (args.doc_tokens or args.query_tokens), "--tokenizer: needs lengths in tokens"),
        (args.slo and args.requests, "--requests: not with --slo, give --seconds"),
        (args.tune and (args.rate or args.saturate or args.runs > 1), "--tune: not with --rate, --saturate or --runs"),
        (args.tune and given and len(args.concurrency) > 1, "--concurrency: one level with --tune"),
        (not args.tune and words & {"--budget", "--score-tolerance"}, "--budget, --score-tolerance: need --tune"),
        (args.fail_over is not None and not args.compare, "--fail-over: needs --compare"),
        (args.compare and unused, f"{min(unused, default='')}: not with --compare, which measures nothing"),
        (args.tune and words & {"--price-per-hour", "--target-pairs-s"}, "--price-per-hour: not with --tune"),
        (args.compare and len(args.compare) < 2, "--compare: needs two files or more"),
    ):
        if wrong:
            parser.error(f"argument {text}")
    if args.tune:
        args.endpoint = args.endpoint[:1]
        args.concurrency = args.concurrency if given else [TUNE_CONCURRENCY]
    try:
        cfg = get_config(base_url=args.base_url, served_model_name=args.model, timeout_s=args.timeout_s)
        args.base_url, args.model, args.timeout_s = cfg.local_base_url, cfg.served_model_name, cfg.timeout_s
        for url in map(str.strip, args.base_url.split(",")):
            if not re.fullmatch(r"https?://([^/@\s]*@)?(\[[\da-fA-F:]+\]|[^:/@\s]+)(:\d{1,5})?(/\S*)?", url):
                raise ValueError(f"base URL {without_secrets([url])} is not http://HOST:PORT/v1")
        for name in filter(None, (args.json, args.csv, args.html)):
            open(name, "a").close()  # now, not after a long run
    except (ValueError, OSError) as exc:  # ConfigError is a ValueError
        parser.error(str(exc))
    args.argv = argv
    if args.seed is None:
        # A seed that the server has seen finds its texts in the prefix cache: a new one for each run.
        args.seed = random.SystemRandom().randrange(10**9)
        args.argv = [*argv, "--seed", str(args.seed)]
    return args, cfg.api_key, cfg.connect_timeout_s


def main(argv: list[str] | None = None) -> int:
    """0 done; 1 no server, no good answer, or a regression; 2 usage; 130 Ctrl-C (what was measured is printed)."""
    args, api_key, connect_timeout_s = parse_args(sys.argv[1:] if argv is None else argv)
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
    sys.exit(main())
