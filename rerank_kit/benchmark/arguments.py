"""The command line of the benchmark."""

import argparse
import math
import os
import random
import re

from rerank_kit.benchmark.knobs import NAMES
from rerank_kit.benchmark.server_view import without_secrets
from rerank_kit.benchmark.texts import Lengths
from rerank_kit.benchmark.tune import TOLERANCE, budget, knob_names
from rerank_kit.settings import called_config

EXAMPLES = """examples ("sh start_rerank.sh bench" is the same program with the right Python):
  %(prog)s --endpoint rerank --concurrency 1,4,16,64 --seconds 10
  %(prog)s --endpoint rerank --saturate --seconds 10 --html report.html
  %(prog)s --endpoint rerank --slo p95=500ms
  %(prog)s --input calls.jsonl --runs 5 --json before.json
  %(prog)s --compare before.json after.json --fail-over 5"""
TUNE_CONCURRENCY = 16  # calls in flight, unless --concurrency


def numbers(kind: type, low: float, many: bool = False):
    """argparse type: one number, or several separated by commas. The error names a bad one."""

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


def try_to_write(name: str) -> None:
    """OSError when the file cannot be written. A file that was not there is not left behind, empty."""
    there = os.path.lexists(name)
    open(name, "a").close()
    if not there:
        os.unlink(name)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, str | None, float]:
    """Parse the command line; exits 2 on unusable arguments. Returns (args, API key, connect timeout in s)."""
    parser = argparse.ArgumentParser(
        prog="bench_rerank.py",
        description="Load test of the running rerank service. docs/benchmarking.md says how to read the result.",
        usage="%(prog)s [options]",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # An exclusive group belongs to a titled one, which is what --help shows.
    groups = [
        parser.add_argument_group(title)
        for title in ("load", "texts", "service", "output", "tuning", "quality", "comparison")
    ]
    g_load, g_texts, g_service, g_output, g_tune, g_quality, g_compare = groups
    load, size = g_load.add_mutually_exclusive_group(), g_load.add_mutually_exclusive_group()
    doc, query, repeat = (g_texts.add_mutually_exclusive_group() for _ in range(3))
    # fmt: off
    g_load.add_argument("--endpoint", default="rerank,score", choices=["rerank", "score", "rerank,score"],
        metavar="NAME", help="rerank, score or rerank,score (default: %(default)s)")
    load.add_argument("--concurrency", type=numbers(int, 1, True), default=[1, 16, 50, 100, 150], metavar="N,N",
        help="closed loop: calls in flight (default: 1,16,50,100,150); a refused call is sent again at once, "
             "Retry-After is ignored")
    load.add_argument("--rate", type=numbers(float, 0.001, True), metavar="R,R",
        help="open loop: calls per second, e.g. 5,10")
    load.add_argument("--saturate", action="store_true",
        help="closed loop: double the calls in flight until throughput stops growing")
    load.add_argument("--slo", type=slo, metavar="p95=500ms",
        help="open loop: find the highest rate that keeps p50, p90, p95 or p99 within this latency")
    g_load.add_argument("--constant", action="store_true",
        help="with --rate or --slo: constant arrivals instead of Poisson")
    size.add_argument("--requests", type=numbers(int, 1), metavar="N",
        help="calls per level (default: 100, or more for 3 rounds (closed loop) or 10 s (open loop))")
    size.add_argument("--seconds", type=numbers(float, 0.001), metavar="S",
        help="length of a level, instead of --requests")
    g_load.add_argument("--warmup", type=numbers(int, 0), metavar="N",
        help="calls before the window (default: 5, or more for 1 round (closed loop) or 1 s (open loop))")
    g_load.add_argument("--runs", type=numbers(int, 1), default=1, metavar="N",
        help="repeat all levels N times, for --compare (default: 1)")
    g_load.add_argument("--processes", type=numbers(int, 1), metavar="N",
        help="client processes (default: 1; more are started when the client is the bottleneck)")
    g_texts.add_argument("--docs", type=numbers(int, 1), metavar="N", help="documents per call (default: 32)")
    doc.add_argument("--doc-words", type=lengths, default="100", metavar="LENGTH",
        help="words per document: 100, 64-512 (uniform) or lognormal:MEAN,SIGMA (default: %(default)s)")
    doc.add_argument("--doc-tokens", type=lengths, metavar="LENGTH", help="tokens per document, instead of words")
    query.add_argument("--query-words", type=lengths, default="10", metavar="LENGTH",
        help="words per query (default: %(default)s)")
    query.add_argument("--query-tokens", type=lengths, metavar="LENGTH", help="tokens per query, instead of words")
    g_texts.add_argument("--tokenizer", metavar="FOLDER",
        help="for lengths in tokens (default: the served model's folder)")
    g_texts.add_argument("--input", metavar="FILE",
        help="your own calls or pairs: JSON lines, CSV, TSV or Parquet (docs/bulk.md)")
    g_texts.add_argument("--seed", type=numbers(int, 0), metavar="N",
        help="seed of texts and arrivals (default: a new one per run, printed)")
    repeat.add_argument("--repeat", nargs="?", const="all", choices=["all", "query"],
        help="measure the prefix cache: every call is identical (all) or has the same query (query)")
    repeat.add_argument("--shared-query", action="store_true", help="the same as --repeat query")
    g_service.add_argument("--base-url", metavar="URL",
        help="default: BASE_URL, else HOST and PORT; with several (commas), each call goes to the least busy one")
    g_service.add_argument("--model", metavar="NAME", help="default: SERVED_MODEL_NAME")
    g_service.add_argument("--timeout-s", metavar="S", help="seconds to wait for an answer (default: TIMEOUT_S)")
    g_output.add_argument("--verbose", action="store_true",
        help="print everything that is needed to repeat the run above the table, not below it")
    g_output.add_argument("--json", metavar="FILE", help="write the header and the rows")
    g_output.add_argument("--csv", metavar="FILE", help="write the rows")
    g_output.add_argument("--html", metavar="FILE",
        help="write a page with charts; with --compare: charts of all files")
    g_output.add_argument("--price-per-hour", type=numbers(float, 0), metavar="PRICE",
        help="price of the service: print the cost per million pairs")
    g_output.add_argument("--target-pairs-s", type=numbers(float, 0.001, True), metavar="R,R",
        help="print the GPUs these rates need, e.g. 1000,5000")
    g_tune.add_argument("--tune", nargs="?", const=list(NAMES), type=knob_names, metavar="NAMES",
        help="search for better settings by restarting the service of this host (docs/benchmarking.md)")
    g_tune.add_argument("--budget", type=budget, default=1800.0, metavar="30m",
        help="with --tune: time limit (default: 30m)")
    g_tune.add_argument("--score-tolerance", type=numbers(float, 0), default=TOLERANCE, metavar="D",
        help="with --tune: reject settings that change any score by more than this (default: %(default)s)")
    g_compare.add_argument("--compare", nargs="+", metavar="FILE",
        help="compare files written by --json with the first one; measures nothing")
    g_quality.add_argument("--quality", metavar="PATH",
        help="measure how well the service ranks, on judgements; options of its own: --quality --help")
    g_quality.add_argument("--calibrate", nargs="?", const="", metavar="precision=0.9",
        help="with --quality: find the threshold")
    g_compare.add_argument("--fail-over", type=numbers(float, 0), metavar="PERCENT",
        help="with --compare: exit 1 on a larger regression")
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
        (args.input and texts, f"{min(texts, default='')}: not with --input, which has its own texts"),
        (args.runs > 1 and (args.slo or args.saturate), "--runs: not with a search"),
        (args.tokenizer and not (args.doc_tokens or args.query_tokens), "--tokenizer: needs lengths in tokens"),
        (args.slo and args.requests, "--requests: not with --slo, give --seconds"),
        (args.tune and (args.rate or args.saturate or args.runs > 1), "--tune: not with --rate, --saturate or --runs"),
        (args.tune and given and len(args.concurrency) > 1, "--concurrency: one level with --tune"),
        (not args.tune and words & {"--budget", "--score-tolerance"}, "--budget, --score-tolerance: need --tune"),
        (args.calibrate is not None, "--calibrate: needs --quality"),
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
        cfg = called_config(base_url=args.base_url, served_model_name=args.model, timeout_s=args.timeout_s)
        args.base_url, args.model, args.timeout_s = cfg.local_base_url, cfg.served_model_name, cfg.timeout_s
        for url in map(str.strip, args.base_url.split(",")):
            if not re.fullmatch(r"https?://([^/@\s]*@)?(\[[\da-fA-F:]+\]|[^:/@\s]+)(:\d{1,5})?(/\S*)?", url):
                raise ValueError(f"base URL {without_secrets([url])} is not http://HOST:PORT/v1")
        for name in filter(None, (args.json, args.csv, args.html)):
            try_to_write(name)  # now, not after a long run
    except (ValueError, OSError) as exc:  # ConfigError is a ValueError
        parser.error(str(exc))
    args.argv = argv
    if args.seed is None:
        # With a seed used before, the prefix cache would hold the texts, so each run draws a new one.
        args.seed = random.SystemRandom().randrange(10**9)
        args.argv = [*argv, "--seed", str(args.seed)]
    return args, cfg.api_key, cfg.connect_timeout_s
