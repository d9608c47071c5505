"""The command line of the benchmark."""

import argparse
import math
import random
import re

from rerank_kit.benchmark.knobs import NAMES
from rerank_kit.benchmark.server_view import without_secrets
from rerank_kit.benchmark.texts import Lengths
from rerank_kit.benchmark.tune import TOLERANCE, budget, knob_names
from rerank_kit.settings import get_config

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


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, str | None, float]:
    """Parse the command line; exits 2 on unusable arguments. Returns (args, API key, connect timeout in s)."""
    parser = argparse.ArgumentParser(description="Load test of the running rerank service.", allow_abbrev=False)
    add = parser.add_argument
    load, size, doc, query, repeat = (parser.add_mutually_exclusive_group() for _ in range(5))
    # fmt: off
    add("--endpoint", default="rerank,score", choices=["rerank", "score", "rerank,score"], help="default: %(default)s")
    load.add_argument("--concurrency", type=numbers(int, 1, True), default=[1, 16, 50, 100, 150],
                      help="closed loop: calls in flight (default: 1,16,50,100,150)")
    load.add_argument("--rate", type=numbers(float, 0.001, True), help="open loop: calls per second, e.g. 5,10")
    add("--tune", nargs="?", const=list(NAMES), type=knob_names, metavar="NAMES",
        help="search for better settings by restarting the service of this host (docs/benchmarking.md)")
    add("--budget", type=budget, default=1800.0, metavar="30m", help="with --tune: time limit (default: 30m)")
    add("--score-tolerance", type=numbers(float, 0), default=TOLERANCE,
        help="with --tune: reject settings that change any score by more than this (default: %(default)s)")
    load.add_argument("--saturate", action="store_true",
                      help="closed loop: double the calls in flight until throughput stops growing")
    load.add_argument("--slo", type=slo, metavar="p95=500ms",
                      help="open loop: find the highest rate that keeps p50, p90, p95 or p99 within this latency")
    add("--constant", action="store_true", help="with --rate or --slo: constant arrivals instead of Poisson")
    size.add_argument("--requests", type=numbers(int, 1),
                      help="calls per level (default: 100, or more for 3 rounds (closed loop) or 10 s (open loop))")
    size.add_argument("--seconds", type=numbers(float, 0.001), help="length of a level, instead of --requests")
    add("--warmup", type=numbers(int, 0),
        help="calls before the window (default: 5, or more for 1 round (closed loop) or 1 s (open loop))")
    add("--runs", type=numbers(int, 1), default=1, help="repeat all levels N times, for --compare (default: 1)")
    add("--processes", type=numbers(int, 1),
        help="client processes (default: 1; more are started when the client is the bottleneck)")
    add("--docs", type=numbers(int, 1), help="documents per call (default: 32)")
    doc.add_argument("--doc-words", type=lengths, default="100",
                     help="words per document: 100, 64-512 (uniform) or lognormal:MEAN,SIGMA (default: %(default)s)")
    doc.add_argument("--doc-tokens", type=lengths, help="tokens per document, instead of words")
    query.add_argument("--query-words", type=lengths, default="10", help="words per query (default: %(default)s)")
    query.add_argument("--query-tokens", type=lengths, help="tokens per query, instead of words")
    add("--tokenizer", metavar="FOLDER", help="for lengths in tokens (default: the served model's folder)")
    add("--input", metavar="FILE", help="your own calls or pairs: JSON lines, CSV, TSV or Parquet (docs/bulk.md)")
    add("--seed", type=numbers(int, 0), help="seed of texts and arrivals (default: a new one per run, printed)")
    repeat.add_argument("--repeat", nargs="?", const="all", choices=["all", "query"],
        help="measure the prefix cache: every call is identical (all) or has the same query (query)")
    repeat.add_argument("--shared-query", action="store_true", help="the same as --repeat query")
    add("--base-url",
        help="default: BASE_URL, else HOST and PORT; with several (commas), each call goes to the least busy one")
    add("--model", help="default: SERVED_MODEL_NAME")
    add("--timeout-s", help="seconds to wait for an answer (default: TIMEOUT_S)")
    add("--json", metavar="FILE", help="write the header and the rows")
    add("--csv", metavar="FILE", help="write the rows")
    add("--html", metavar="FILE", help="write a page with charts; with --compare: charts of all files")
    add("--price-per-hour", type=numbers(float, 0), help="price of the service: print the cost per million pairs")
    add("--target-pairs-s", type=numbers(float, 0.001, True), help="print the GPUs these rates need, e.g. 1000,5000")
    add("--compare", nargs="+", metavar="FILE",
        help="compare files written by --json with the first one; measures nothing")
    add("--quality", metavar="PATH",
        help="measure how well the service ranks, on judgements; options of its own: --quality --help")
    add("--calibrate", nargs="?", const="", metavar="precision=0.9", help="with --quality: find the threshold")
    add("--fail-over", type=numbers(float, 0), metavar="PERCENT",
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
        # With a seed used before, the prefix cache would hold the texts, so each run draws a new one.
        args.seed = random.SystemRandom().randrange(10**9)
        args.argv = [*argv, "--seed", str(args.seed)]
    return args, cfg.api_key, cfg.connect_timeout_s
