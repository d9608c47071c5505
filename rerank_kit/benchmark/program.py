"""One run of the benchmark, from the first question to the files."""

import argparse
import datetime
import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import aiohttp

from rerank_kit.benchmark.compare import compare
from rerank_kit.benchmark.load import Bench, Level, say
from rerank_kit.benchmark.page import compare_page
from rerank_kit.benchmark.quality.compare import is_quality
from rerank_kit.benchmark.quality.compare import run_compare as run_quality_compare
from rerank_kit.benchmark.report import COLUMNS, cost_lines, table_line
from rerank_kit.benchmark.rows import Interrupted, Rows, check, level_of, texts_of
from rerank_kit.benchmark.searches import saturate, search_slo
from rerank_kit.benchmark.server_view import (
    ask_server,
    hardware,
    is_local,
    model_config,
    server_flags,
    server_processes,
    without_secrets,
)


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
        **({} if args.price_per_hour is None else {"price_per_hour": args.price_per_hour}),
        "load": f"{load}, {size} a level after the warm-up",
        "texts": bench.texts.about,
        "tokens_per_pair": tokens_per_pair,
        "seed": args.seed,
    }


# What stands above the table; the rest comes below it.
FIRST = ("server", "vllm", "model", "hardware", "load", "texts")


def print_facts(about: dict, wanted: Callable[[str], object]) -> None:
    """A line for each fact of describe() with a wanted name."""
    for name, value in about.items():
        if name not in ("error_texts", "findings") and wanted(name):
            print(f"# {name}: {'unknown' if value is None else value}")


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
    print_facts(about, lambda name: args.verbose or args.tune or name in FIRST)
    print(table_line({name: name for name in COLUMNS}), flush=True)
    about |= {"error_texts": bench.error_texts, "findings": []}
    rows = Rows(args, bench, about)
    rows.model, rows.gpu = model_config(answers["model_root"]), about["hardware"]
    return rows


def finish(args: argparse.Namespace, rows: Rows) -> bool:
    """Add what follows from the rows, print it and write the files. False = a file could not be written."""
    findings = rows.about["findings"]
    for row in rows.rows:
        findings.append(f"{row['endpoint']} {row['mode']} {row['level']:g}: {row['bound']}: {row['verdict']}")
    if args.price_per_hour or args.target_pairs_s:
        findings += cost_lines(rows.about, rows.rows, args.price_per_hour, args.target_pairs_s)
    for text in findings:
        print(f"# {text}")
    return rows.write()


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

        def print_rest() -> None:
            if not args.verbose:
                print("# --- to repeat it ---")
                print_facts(about, lambda name: name not in FIRST)

        try:
            if args.saturate or args.slo:
                for endpoint in args.endpoint:
                    about["findings"].append(await (saturate if args.saturate else search_slo)(rows, endpoint))
            else:
                for level in levels_of(args):
                    await rows.make(level)
        except Interrupted:
            finish(args, rows)
            print_rest()
            return 130
        except RuntimeError as exc:
            say(f"[ERR] {exc}")
            return 1
    written = finish(args, rows)
    print_rest()
    return 0 if written and any(row["ok"] for row in rows.rows) else 1


def run_compare(names: list[str], fail_over: float | None, page: str | None = None) -> int:
    """Print how each file differs from the first. 1 = a regression of more than fail_over %, 2 = cannot be judged."""
    try:
        outs = [json.loads(Path(name).read_text("utf-8")) for name in names]
        if any(map(is_quality, outs)):
            return run_quality_compare(names, outs, fail_over, page)
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
