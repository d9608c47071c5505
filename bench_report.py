"""What a benchmark found: rows of numbers, their doubts, the table, the files (bench_rerank.py)."""

import argparse
import csv
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from bench_workload import Level

# fmt: off
COLUMNS = {"endpoint": 8, "mode": 6, "level": 6, "ok": 6, "err": 5, "req/s": 7, "pairs/s": 8, "p50_ms": 7,
           "p90_ms": 7, "p95_ms": 7, "p99_ms": 7, "max_ms": 7, "errors": 0}  # name: width
# fmt: on


def percentile(values: list[float], p: int) -> float | None:
    """Nearest-rank percentile of sorted values; None with fewer than 100 / (100 - p) of them."""
    n = len(values)
    return None if n * (100 - p) < 100 else values[-(-n * p // 100) - 1]


def summarise(level: Level, n_docs: int) -> dict:
    """Row of one level: the table's columns by their names, then what explains them."""
    measured = [c for c in level.calls if c.measured]
    good = [c for c in measured if c.error is None]
    errors = Counter(c.error for c in measured if c.error)
    latencies = sorted((c.end - c.due) * 1000 for c in good)
    window_s = level.closed - level.opened
    in_window = sum(c.error is None and level.opened < c.end <= level.closed for c in level.calls)
    req_s = in_window / window_s if window_s > 0 else 0.0
    lags_ms = sorted(s * 1000 for s in level.lags_s)
    # A loop that is very late wakes up too seldom for a percentile: its worst then.
    lag_ms = percentile(lags_ms, 95) or max(lags_ms, default=None)
    tokens = sum(c.tokens for c in good)
    row = {"endpoint": level.endpoint, "mode": level.mode, "level": level.level, "ok": len(good)}
    row |= {"err": errors.total(), "req/s": req_s, "pairs/s": req_s * n_docs}
    row |= {f"p{p}_ms": percentile(latencies, p) for p in (50, 90, 95, 99)}
    row |= {"max_ms": latencies[-1] if latencies else None, "errors": dict(errors)}
    row |= {"window_s": window_s, "ok_in_window": in_window, "warmup": level.warmup}
    row["warmup_err"] = sum(c.error is not None for c in level.calls) - errors.total()
    row |= {"tokens_per_pair": tokens / (len(good) * n_docs) if tokens else None}
    row |= {"client_cpu": level.cpu, "client_lag_ms": lag_ms, "interrupted": level.interrupted}
    # A late client adds its lateness to each latency; below a tenth of p50, or 2 ms, it does not matter.
    late = lag_ms is not None and row["p50_ms"] is not None and lag_ms > max(2.0, 0.1 * row["p50_ms"])
    row["client_limited"] = level.cpu > 0.9 or late
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def doubts(row: dict) -> list[str]:
    """Why not to trust a row; empty = nothing known."""
    out = []
    if row["warmup_err"]:
        out.append(f"{row['warmup_err']} calls of the warm-up failed")
    if (row["p50_ms"] or 0) > 1000 * row["window_s"]:
        out.append(f"p50 is longer than the window of {row['window_s']:.1f} s: give it more --seconds or --requests")
    if row["client_limited"]:
        late = f"{row['client_cpu']:.0%} of one core, {row['client_lag_ms'] or 0:.1f} ms late"
        out.append(f"the client was the bottleneck ({late}); the service may be faster")
    return out


def error_cell(row: dict) -> str:
    """`http_429:3,timeout:1`; `-` = no error."""
    return ",".join([f"{kind}:{n}" for kind, n in row["errors"].items()] + ["interrupted"] * row["interrupted"]) or "-"


def table_line(row: dict) -> str:
    """One line of the table; {name: name} gives its head."""
    cells = []
    for name, width in COLUMNS.items():
        value = "-" if row[name] is None else row[name]
        if isinstance(value, float):
            digits = 0 if value >= 1000 else 1 if value >= 10 else 2
            value = f"{value:g}" if name == "level" else f"{value:.{digits}f}"
        cells.append(f"{value:{'<' if name in ('endpoint', 'mode', 'errors') else '>'}{width}}")
    return "  ".join(cells)


def hardware() -> str:
    """GPUs of this host, else its CPU."""
    try:
        ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        cpu = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*:\s*(.+)", cpu.read_text()) if cpu.exists() else None
        names = [name[1] if name else platform.machine()] * (os.cpu_count() or 1)
    return ", ".join(f"{n} x {name}" for name, n in Counter(names).items())


def is_local(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def without_secrets(words: list[str]) -> str:
    """A command line to show: no API key, no password in a URL."""
    line = re.sub(
        r"(--\S*(api.key|hf.token|secret|password|headers)\S*?)([ =](?!--)\S+)+", r"\1 ***", shlex.join(words)
    )
    return re.sub(r"//[^/@\s]*@", "//***@", line)


def server_flags(base_url: str) -> str | None:
    """Arguments of the `vllm serve` on this host that has base_url's port; None = not found, or another host."""
    port = str(urlsplit(base_url).port or 80)
    for path in Path("/proc").glob("[0-9]*/cmdline") if is_local(base_url) else ():
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:  # ended, or not ours to read
            continue
        flags = words[words.index("serve") + 1 :] if "serve" in words else []
        if f"--port={port}" in flags or ("--port", port) in itertools.pairwise(flags):
            return without_secrets(flags)
    return None


def write_files(args: argparse.Namespace, about: dict, rows: list[dict]) -> None:
    """--json and --csv, written anew after each level: a long run that dies leaves what it had."""
    if args.json:
        Path(args.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(row | {"errors": error_cell(row)} for row in rows)
