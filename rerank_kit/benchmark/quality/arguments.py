"""The command line of --quality."""

import argparse
import re
from pathlib import Path

from rerank_kit.benchmark.arguments import numbers
from rerank_kit.benchmark.server_view import without_secrets
from rerank_kit.settings import EnvConfig, called_config

ABOUT = """Measure how well the running service ranks, on judgements (docs/quality.md).

  python bench_rerank.py --quality judgements.jsonl --json bf16.json --html report.html
  python bench_rerank.py --quality BEIR_FOLDER [--run first_stage.trec]
  python bench_rerank.py --quality qrels.txt --run run.trec --corpus corpus.jsonl --queries queries.tsv
  python bench_rerank.py --quality judgements.jsonl --calibrate precision=0.9
  python bench_rerank.py --compare bf16.json fp8.json --fail-over 1
"""


def target(text: str) -> list[tuple[str, float]]:
    """argparse type: `precision=0.9,recall=0.8` as [("precision", 0.9), ("recall", 0.8)]."""
    out = []
    for part in text.split(","):
        found = re.fullmatch(r"(precision|recall)=(0?\.\d+|1|1\.0+|0\.\d+)", part.strip())
        if not found or not float(found[2]):
            raise argparse.ArgumentTypeError(f"{part!r} is not a target: write precision=0.9 or recall=0.8 (above 0)")
        out.append((found[1], float(found[2])))
    return out


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, EnvConfig]:
    """Parse the command line; exits 2 on unusable arguments."""
    parser = argparse.ArgumentParser(
        prog="bench_rerank.py",
        description=ABOUT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--quality", nargs="?", type=Path, metavar="PATH",
        help="judgements: JSON lines, a BEIR folder, TREC qrels; with --calibrate also the --json of an earlier run")
    add("--run", type=Path, metavar="FILE", help="candidates as a TREC run, best first (default for folders: BM25)")
    add("--corpus", type=Path, metavar="FILE", help="documents of TREC qrels: JSON lines (_id, text) or id, tab, text")
    add("--queries", type=Path, metavar="FILE", help="queries of TREC qrels, in the same form")
    add("--split", default="test", help="folder: which file of qrels/ (default: %(default)s)")
    add("--candidates", type=numbers(int, 2), default=100, help="most documents per query (default: %(default)s)")
    add("--sample", type=numbers(int, 1), help="measure this many queries only, drawn by --seed")
    add("--relevant", type=numbers(int, 1), default=1, metavar="GRADE",
        help="lowest grade that counts as relevant, but for nDCG, which takes grades as gains (default: %(default)s)")
    add("--unjudged", choices=["irrelevant", "skip"], default="irrelevant",
        help="candidates without judgement: not relevant, as trec_eval counts them, or left out (default: %(default)s)")
    add("--k", type=numbers(int, 1), default=10, help="cut-off of nDCG, MRR and recall (default: %(default)s)")
    add("--threshold", type=numbers(float, -1e9), help="precision and recall of the documents that score this or more")
    add("--calibrate", nargs="?", const=[("precision", 0.9)], type=target, metavar="precision=0.9",
        help="find the threshold that reaches a precision or a recall (several with commas)")
    add("--offline", action="store_true", help="score with vllm.LLM in this process (MODEL_PATH), without a service")
    add("--instruction", help="task instruction of all queries that bring none")
    add("--long-documents", choices=["truncate", "error", "chunk"], help="default: the service's LONG_DOCUMENTS")
    add("--max-tokens-per-doc", type=numbers(int, 1), help="cut documents to this many tokens")
    add("--concurrency", type=numbers(int, 1), default=4, help="queries in flight (default: %(default)s)")
    add("--seed", type=numbers(int, 0), default=0, help="of --sample, intervals and tests (default: %(default)s)")
    add("--base-url", help="default: BASE_URL, else HOST and PORT")
    add("--model", help="default: SERVED_MODEL_NAME")
    add("--timeout-s", help="seconds to wait for an answer (default: TIMEOUT_S)")
    add("--json", metavar="FILE", help="write metrics, per-query values and all scores")
    add("--html", metavar="FILE", help="write a page with charts")
    # fmt: on
    args = parser.parse_args(argv)
    for wrong, text in (
        (args.quality is None, "--quality: expected one argument, the judgements"),
        (
            args.offline and (args.base_url or args.model),
            "--offline: not with --base-url or --model, it loads MODEL_PATH",
        ),
        (
            args.max_tokens_per_doc and args.long_documents in ("error", "chunk"),
            f"--max-tokens-per-doc cuts: not with --long-documents {args.long_documents}",
        ),
    ):
        if wrong:
            parser.error(f"argument {text}")
    try:
        cfg = called_config(base_url=args.base_url, served_model_name=args.model, timeout_s=args.timeout_s)
        args.base_url, args.model, args.timeout_s = cfg.local_base_url, cfg.served_model_name, cfg.timeout_s
        for url in map(str.strip, args.base_url.split(",")):
            if not re.fullmatch(r"https?://\S+", url):
                raise ValueError(f"base URL {without_secrets([url])} is not http://HOST:PORT/v1")
        for name in filter(None, (args.json, args.html)):
            open(name, "a").close()  # now, not after a long run
    except (ValueError, OSError) as exc:  # ConfigError is a ValueError
        parser.error(str(exc))
    args.argv = argv
    return args, cfg
