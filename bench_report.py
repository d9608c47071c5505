"""What a benchmark found: rows and verdicts, the table, files, page, cost and comparison (bench_rerank.py)."""

import contextlib
import csv
import html
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from bench_workload import Level

# fmt: off
COLUMNS = {"endpoint": 8, "mode": 6, "level": 6, "ok": 6, "refused": 7, "err": 5, "req/s": 7, "pairs/s": 8, "tok/s": 8,
           "p50_ms": 7, "p90_ms": 7, "p95_ms": 7, "p99_ms": 7, "max_ms": 7, "bound": 6, "errors": 0}  # name: width
# fmt: on
REFUSED = ("http_429", "http_503")  # the server's way to say "not now": load, not a fault
# What bench_rerank.py may see of the server's side inside a window; None = not seen.
SEEN = ("gpu_util", "gpu_mem_gib", "api_cpu", "engine_cpu", "server_cpu", "host_cpu", "host_cores")
SEEN += ("queue_ms", "cache_hits", "step_tokens")


# --- rows ---


def percentile(values: list[float], p: int) -> float | None:
    """Nearest-rank percentile of sorted values; None with fewer than 100 / (100 - p) of them."""
    n = len(values)
    return None if n * (100 - p) < 100 else values[-(-n * p // 100) - 1]


def summarise(level: Level, seen: dict | None = None) -> dict:
    """Row of one level: the table's columns by their names, then what explains them.

    Args:
        seen: what was seen of the server inside the window, by the names in SEEN.
    """
    measured = [c for c in level.calls if c.measured]
    good = [c for c in measured if c.error is None]
    errors = Counter(c.error for c in measured if c.error)
    refused = sum(errors[kind] for kind in REFUSED)
    latencies = sorted((c.end - c.due) * 1000 for c in good)
    window_s = level.closed - level.opened
    inside = [c for c in level.calls if c.error is None and level.opened < c.end <= level.closed]
    per_s = 1 / window_s if window_s > 0 else 0.0
    lags_ms = sorted(s * 1000 for s in level.lags_s)
    # A loop that is very late wakes up too seldom for a percentile: its worst then.
    lag_ms = percentile(lags_ms, 95) or max(lags_ms, default=None)
    tokens = sum(c.tokens for c in inside)
    row = {"endpoint": level.endpoint, "mode": level.mode, "level": level.level, "ok": len(good)}
    row |= {"refused": refused, "err": errors.total() - refused}
    row |= {"req/s": len(inside) * per_s, "pairs/s": sum(c.pairs for c in inside) * per_s}
    row |= {"tok/s": tokens * per_s if tokens else None}
    row |= {f"p{p}_ms": percentile(latencies, p) for p in (50, 90, 95, 99)}
    row |= {"max_ms": latencies[-1] if latencies else None, "bound": None, "errors": dict(errors)}
    row |= {"run": level.run, "window_s": window_s, "ok_in_window": len(inside), "warmup": level.warmup}
    row["warmup_err"] = sum(c.error is not None for c in level.calls) - errors.total()
    row |= {"tokens_per_pair": tokens / sum(c.pairs for c in inside) if tokens else None}
    row |= {"client_processes": level.processes, "client_cpu": level.cpu, "client_lag_ms": lag_ms}
    row["interrupted"] = level.interrupted
    # A late client adds its lateness to each latency; below a tenth of p50, or 2 ms, it does not matter.
    late = lag_ms is not None and row["p50_ms"] is not None and lag_ms > max(2.0, 0.1 * row["p50_ms"])
    row["client_limited"] = level.cpu > 0.9 or late
    missed = sum(ms > level.slo_ms for ms in latencies) + errors.total() if level.slo_ms else None
    row |= {"slo_missed": missed, "slo_held": None, **dict.fromkeys(SEEN), **(seen or {})}
    row["bound"], row["verdict"] = verdict(row)
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    return row | {"series": {"histogram": histogram(latencies), "timeline": timeline(level)}}


def histogram(latencies: list[float]) -> list[list]:
    """[from_ms, to_ms, calls] of sorted latencies. Equal ratios, as latencies spread over decades; 5 % or wider."""
    if not latencies:
        return []
    low, high = max(latencies[0], 0.001), max(latencies[-1], 0.001)
    ratio = max((high / low) ** (1 / 24), 1.05)
    counts = Counter(int(math.log(max(ms, low) / low, ratio)) for ms in latencies)
    return [[round(low * ratio**i, 3), round(low * ratio ** (i + 1), 3), counts[i]] for i in range(max(counts) + 1)]


def timeline(level: Level) -> list[dict]:
    """The window in 40 parts: what was answered in each."""
    out = []
    part_s = (level.closed - level.opened) / 40
    parts = [[] for _ in range(40)]
    for call in level.calls:
        if part_s > 0 and level.opened < call.end <= level.closed:
            parts[min(39, int((call.end - level.opened) / part_s))].append(call)
    for i, calls in enumerate(parts):
        ms = sorted((c.end - c.due) * 1000 for c in calls if c.error is None)
        pairs = sum(c.pairs for c in calls if c.error is None)
        at = {
            "t_s": (i + 0.5) * part_s,
            "pairs/s": pairs / part_s if part_s > 0 else 0.0,
            "failed": len(calls) - len(ms),
        }
        at |= {"p50_ms": ms[len(ms) // 2] if ms else None, "max_ms": ms[-1] if ms else None}
        out.append({k: round(v, 3) if isinstance(v, float) else v for k, v in at.items()})
    return out


def verdict(row: dict) -> tuple[str, str]:
    """What bounds a row, in a word for the table, and the reason with the knob to turn.

    Reads ok, refused, err, mode, p50_ms, what begins with client_, and SEEN. 85 % of a GPU's time or of a core counts
    as busy, because a window never is without gaps.
    """
    word, why = what_bounds(row)
    if row["ok"] and row["refused"]:
        why += f"; {row['refused'] / calls_of(row):.0%} of the calls were refused (MAX_WAIT_S, MAX_PAIRS_IN_FLIGHT)"
    return word, why


def what_bounds(row: dict) -> tuple[str, str]:
    """The rules of verdict(), the first that fits."""
    gpu, api, host, queue_ms = row["gpu_util"], row["api_cpu"], row["host_cpu"], row["queue_ms"]
    load = "more calls in flight" if row["mode"] == "closed" else "a higher rate"
    if not row["ok"]:
        if row["refused"]:
            return "refuse", "every call was refused: fewer calls, or see MAX_WAIT_S and MAX_PAIRS_IN_FLIGHT"
        return "none", "no good answer: see the errors"
    if row["client_limited"]:
        late = f"{row['client_lag_ms'] or 0:.1f} ms late"
        busy = f"a client process took {row['client_cpu']:.0%} of a core and was {late}: the service may be faster"
        if row["client_cpu"] < 0.25 or (host or 0) >= 0.9:  # it waits for a core: more processes would too
            return "client", f"{busy}; a host of its own for the client"
        return "client", f"{busy}; --processes, or another host for the client"
    if gpu is not None and gpu >= 85:
        less = "QUANTIZATION=fp8, shorter documents (MAX_TOKENS_PER_DOC), or more GPUs (DP)"
        return "gpu", f"the busiest GPU worked {gpu:.0f} % of the time: {less}"
    if api is not None and api >= 0.85:
        more = "API_SERVER_COUNT, VLLM_USE_FASTOKENS=1; more GPUs do not help"
        return "cpu", f"an API process (HTTP, tokenizing) took {api:.2f} cores: {more}"
    engine = row["engine_cpu"]
    if gpu is not None and engine is not None and engine >= 0.85:
        # On a CPU the engine computes the model: it is meant to be busy there.
        one = "one engine process cannot feed this GPU with a model of this size; more GPUs (DP) bring an engine each"
        return "engine", f"the engine process took {engine:.2f} cores, the GPU worked {gpu:.0f} % of the time: {one}"
    if host is not None and host >= 0.9:
        ours = (row["server_cpu"] or 0.0) + row["client_cpu"] * row["client_processes"]
        if row["server_cpu"] is not None and ours < 0.5 * host * row["host_cores"]:
            busy = f"server and client took {ours:.1f} of this host's {row['host_cores']} busy cores"
            return "other", f"{busy}: measure when nothing else runs"
        more = "more cores, or a GPU where the model computes on the CPU"
        return "cpu", f"all cores of this host were busy ({host:.0%}): {more}"
    if gpu is None and api is None:
        return "?", "neither GPU nor server processes were seen: run it on the server's host"
    shown = ((gpu, "GPU {:.0f} %"), (api, "API process {:.2f} cores"))
    seen = ", ".join(text.format(value) for value, text in shown if value is not None)
    if queue_ms is not None and row["p50_ms"] and queue_ms > 0.3 * row["p50_ms"]:
        waited = f"pairs waited {queue_ms:.0f} ms for the engine while nothing was busy ({seen})"
        return "engine", f"{waited}: its steps are too small: MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS"
    if (gpu or 0) < 50 and (api or 0) < 0.5:
        return "idle", f"the service had room ({seen}): {load}"
    return "mixed", f"nothing was busy all the time ({seen}): {load}, then API_SERVER_COUNT"


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


def calls_of(row: dict) -> int:
    """Calls that were sent (open loop: due) inside the window."""
    return row["ok"] + row["refused"] + row["err"]


def late_share(missed: int, calls: int) -> tuple[float, float]:
    """Share of calls that missed, and its upper limit with 95 % confidence (Wilson score, one-sided)."""
    share, z = missed / calls, 1.645
    middle = share + z * z / (2 * calls)
    spread = z * math.sqrt(share * (1 - share) / calls + z * z / (4 * calls * calls))
    return share, min(1.0, (middle + spread) / (1 + z * z / calls))


def knee(rows: list[dict]) -> dict:
    """The first row, in order of load, that has 95 % of the best throughput."""
    best = max(row["req/s"] for row in rows)
    return next(row for row in rows if row["req/s"] >= 0.95 * best)


def stops_growing(rows: list[dict]) -> bool:
    """Two doublings in a row brought less than 5 % more than the best before them."""
    return len(rows) > 2 and max(r["req/s"] for r in rows[-2:]) < 1.05 * max(r["req/s"] for r in rows[:-2])


async def highest_rate(held, guess: float, most: int) -> tuple[float, float, bool]:
    """Bisect for the highest rate that holds, in at most `most` tries.

    One window may be lucky or disturbed: the two rates of the answer are tried twice, and the search goes on where
    the second try changes the picture.

    Args:
        held: async function, rate in calls/s -> did it hold, over all its tries so far.
        guess: the first rate to try; none below a 64th of it is tried.

    Returns:
        (highest rate that held, 0 = none; lowest that did not, inf = none; were both tried twice). 10 % or less
        apart, unless the tries ran out.
    """
    holds: dict[float, bool] = {}
    tries, rate = Counter(), guess
    for _ in range(most):
        holds[rate] = await held(rate)
        tries[rate] += 1
        high = min((r for r in holds if not holds[r]), default=math.inf)
        low = max((r for r in holds if holds[r] and r < high), default=0.0)
        if high == math.inf or not low or high > 1.1 * low:
            step = 1.5 * low if high == math.inf else math.sqrt(low * high) if low else high / 2
            rate = float(f"{step:.3g}")  # three digits: easy to write down
            if rate < guess / 64:
                break
        elif tries[low] > 1 and tries[high] > 1:
            return low, high, True
        else:
            rate = low if tries[low] < 2 else high
    return low, high, False


def slo_text(what: str, p: int, slo_ms: float, rows: list[dict], low: float, high: float, sure: bool) -> str:
    """The finding of an SLO search in sentences, with what limits it; rows: its windows."""
    at = [row for row in rows if row["level"] == low]
    if any(row["client_limited"] for row in rows if row["level"] == high):
        what = f"the client was the limit at {high:.3g} calls/s, the service may be faster; {what}"
    if not low:
        return f"{what} did not hold even at {high:.3g} calls/s"
    calls, missed = sum(map(calls_of, at)), sum(row["slo_missed"] for row in at)
    share, most = late_share(missed, calls)
    pairs = sum(row["pairs/s"] * row["window_s"] for row in at) / sum(row["window_s"] for row in at)
    overload = slo_ms / 1000 / max(row["window_s"] for row in at) / (p / 100)
    above = f"not at {high:.3g}" if high < math.inf else "no rate was too high"
    out = [f"{what} held up to {low:.3g} calls/s = {pairs:.4g} pairs/s, {above}"]
    out += ["NOT confirmed, the windows ran out"] * (not sure)
    windows = f"{len(at)} window" + "s" * (len(at) > 1)
    out.append(
        f"{missed} of {calls} calls missed there in {windows} ({share:.1%}, below {most:.1%} with 95 % confidence if "
        "calls were independent, which calls in one queue are not)"
    )
    return "; ".join([*out, f"an overload below {overload:.1%} would not show in windows this long"])


# --- what is seen of the server's side ---


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


# vLLM's names on /metrics (vllm/v1/metrics/loggers.py; counters get _total from the Prometheus client).
METRICS = {
    "queue_ms": ("vllm:request_queue_time_seconds_sum", "vllm:request_queue_time_seconds_count", 1000),
    "cache_hits": ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total", 1),  # both in tokens
    "step_tokens": ("vllm:iteration_tokens_total_sum", "vllm:iteration_tokens_total_count", 1),
}


def metric_sums(text: str) -> Counter:
    """The counters that METRICS needs from the text of /metrics, each summed over all engines."""
    sums = Counter()
    for name, value in re.findall(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", text, re.M):
        if any(name in names for names in METRICS.values()):
            sums[name] += float(value)
    return sums


def what_changed(first: dict, last: dict, pids: dict[int, bool], gpu_lines: list[str]) -> dict:
    """Counters of two looks at the server, and nvidia-smi's lines (index, % busy, MiB) between, as a row's SEEN."""
    d = {name: last[name] - first[name] for name in last if name in first}
    out, time_s, gpus = {}, d["time_s"], {}
    for line in gpu_lines:
        with contextlib.suppress(ValueError):  # [N/A], or a line cut short
            index, used, mib = map(float, line.split(","))
            gpus.setdefault(index, []).append((used, mib / 1024))
    if gpus:  # the busiest one: others may not be ours
        means = [(statistics.mean(used for used, _ in one), max(gib for _, gib in one)) for one in gpus.values()]
        out["gpu_util"], out["gpu_mem_gib"] = max(means)
    cores = {pid: d[pid] / time_s for pid in pids if pid in d and time_s > 0}
    if cores:
        out["server_cpu"] = sum(cores.values())
        out["api_cpu"] = max((cores[pid] for pid in cores if pids[pid]), default=None)
        out["engine_cpu"] = max((cores[pid] for pid in cores if not pids[pid]), default=None)
    if d.get("host_all"):
        out |= {"host_cpu": d["host_busy"] / d["host_all"], "host_cores": os.cpu_count()}
    for name, (part, whole, unit) in METRICS.items():
        if d.get(whole, 0) > 0 and d.get(part, -1) >= 0:  # less: the server started anew
            out[name] = unit * d[part] / d[whole]
    return out


# --- table ---


def error_cell(row: dict) -> str:
    """`http_429:3,timeout:1`; `-` = no error."""
    return ",".join([f"{kind}:{n}" for kind, n in row["errors"].items()] + ["interrupted"] * row["interrupted"]) or "-"


def table_cells(row: dict) -> list[str]:
    """A row as text, in the order of COLUMNS; {name: name} gives the table's head."""
    cells = []
    for name in COLUMNS:
        value = "-" if row[name] is None else row[name]
        if isinstance(value, float):
            digits = 0 if value >= 1000 else 1 if value >= 10 else 2
            value = f"{value:g}" if name == "level" else f"{value:.{digits}f}"
        cells.append(str(value))
    return cells


def table_line(row: dict) -> str:
    """One line of the table."""
    text = ("endpoint", "mode", "bound", "errors")
    cells = zip(table_cells(row), COLUMNS.items(), strict=True)
    return "  ".join(f"{cell:{'<' if name in text else '>'}{width}}" for cell, (name, width) in cells)


# --- files ---


def write_files(paths: dict[str, str | None], about: dict, rows: list[dict]) -> None:
    """json, csv and html by these names, written anew after each level: a long run that dies leaves what it had."""
    if paths.get("json"):
        Path(paths["json"]).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")
    if paths.get("csv"):
        with open(paths["csv"], "w", newline="", encoding="utf-8") as out:
            names = [name for name in rows[0] if name != "series"]
            writer = csv.DictWriter(out, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(row | {"errors": error_cell(row)} for row in rows)
    if paths.get("html"):
        Path(paths["html"]).write_text(page(about, rows), "utf-8")


# --- cost and comparison ---


def gpus_of(flags: str | None) -> int:
    """GPUs of one service, from the arguments of `vllm serve`; 1 where they are not known."""
    found = [re.search(rf"--{kind}-parallel-size[= ](\d+)", flags or "") for kind in ("tensor", "data", "pipeline")]
    return math.prod(int(f[1]) for f in found if f)


def cost_lines(about: dict, rows: list[dict], price_per_hour: float | None, targets: list[float] | None) -> list[str]:
    """What a million pairs cost at each level, and how many GPUs each target rate (pairs/s) needs."""
    gpus, out = gpus_of(about.get("server_flags")) * about.get("services", 1), []
    for row in rows:
        cells = [f"{row['endpoint']} {row['mode']} {row['level']:g}: {row['pairs/s']:.1f} pairs/s"]
        cells.append("p95 -" if row["p95_ms"] is None else f"p95 {row['p95_ms']:.3g} ms")
        if price_per_hour is not None:
            price = row["pairs/s"] and price_per_hour / 3600 / row["pairs/s"] * 1e6
            cells.append(f"{price:.2f} per million pairs" if price else "no pairs to pay for")
        for target in targets or []:
            need = row["pairs/s"] and math.ceil(target / row["pairs/s"]) * gpus
            cells.append(f"{need} GPUs for {target:g} pairs/s" if need else f"never {target:g} pairs/s")
        out.append(", ".join(cells + ["at most: the client was the limit"] * row["client_limited"]))
    if price_per_hour is not None:
        out.append(f"assumed: {price_per_hour:g} an hour pays for this whole service, busy all the time")
    if targets:
        out.append(
            f"assumed: copies of this service ({gpus} GPU each), every copy as fast as this one and loaded as in its "
            "row, calls spread evenly, CPU cores and memory growing along; no spare for peaks or a copy that fails"
        )
    return out


# Two-sided 95 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom (any statistics textbook).
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T95 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
BETTER = {"pairs/s": 1, "p50_ms": -1, "p95_ms": -1}  # 1: more is better
SETTINGS = ("model", "model_root", "vllm", "server_flags", "hardware", "load", "texts", "tokens_per_pair")


def difference(a: list[float], b: list[float]) -> tuple[float, float] | None:
    """(mean of b - mean of a, half its 95 % interval) by Welch's t; None with fewer than two values in either."""
    if min(len(a), len(b)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    if not sum(parts):
        return statistics.mean(b) - statistics.mean(a), 0.0
    free = sum(parts) ** 2 / sum(p * p / (len(v) - 1) for p, v in zip(parts, (a, b), strict=True))
    t = T95[min(max(int(free), 1), 30) - 1]  # rounded down: the wider interval
    return statistics.mean(b) - statistics.mean(a), t * math.sqrt(sum(parts))


def lost(rows: list[dict]) -> float:
    """Share of the calls that were refused or failed."""
    return sum(r["refused"] + r["err"] for r in rows) / max(1, sum(map(calls_of, rows)))


def compare(base: dict, other: dict, fail_over: float | None = None) -> tuple[list[str], list[str], str]:
    """Differences of two runs (contents of --json), level by level.

    Returns:
        (lines to print, regressions, what cannot be judged: empty = nothing). A regression is a measurable change for
        the worse of more than fail_over percent of base's mean, or a share of lost calls that grew by more points.
    """
    lines, worse, untold = [], [], []
    for name in SETTINGS:
        if base.get(name) != other.get(name):
            lines.append(f"differs: {name}: {base.get(name)} -> {other.get(name)}")
    groups = [{}, {}]
    for group, out in zip(groups, (base, other), strict=True):
        for row in out["rows"]:
            if not row["interrupted"]:
                group.setdefault(f"{row['endpoint']} {row['mode']} {row['level']:g}", []).append(row)
    for level in [*groups[0], *(name for name in groups[1] if name not in groups[0])]:
        rows = [group.get(level) for group in groups]
        if None in rows:
            lines.append(f"{level}: only in {'one' if rows[1] is None else 'the other'}")
            untold.append(f"{level} (only in one file)")
            continue
        if min(map(len, rows)) < 2:
            untold.append(f"{level} (one run, use --runs)")
        for name, sign in BETTER.items():
            a, b = ([row[name] for row in runs if row[name] is not None] for runs in rows)
            if not a or not b or not statistics.mean(a):
                continue
            percent = 100 / statistics.mean(a)
            change = (statistics.mean(b) - statistics.mean(a)) * percent
            said, sure, found = "one run, no interval", False, difference(a, b)
            if found:
                sure = abs(found[0]) > found[1]
                said = ("better" if change * sign > 0 else "worse") if sure else "no measurable difference"
            spread = f" +- {found[1] * percent:.1f}" if found else ""
            means = f"{statistics.mean(a):.1f} -> {statistics.mean(b):.1f}"
            lines.append(f"{level}: {name} {means}: {said} ({change:+.1f}{spread} %)")
            if fail_over is not None and sure and -change * sign > fail_over:
                worse.append(lines[-1])
        if any(row["client_limited"] for row in rows[0] + rows[1]):
            lines.append(f"{level}: the client was the limit in some runs, the service may differ more or less")
        shares = [100 * lost(runs) for runs in rows]
        if any(shares):
            lines.append(f"{level}: lost calls {shares[0]:.1f} % -> {shares[1]:.1f} %")
            if fail_over is not None and shares[1] - shares[0] > fail_over:
                worse.append(lines[-1])
    return lines, worse, ", ".join(untold)


# --- page ---

STYLE = """body{font:14px system-ui,sans-serif;margin:2em;max-width:75em;color:#222}table{border-collapse:collapse}
td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,.text td{text-align:left}
svg{background:#fafafa;margin:4px}svg text{font:11px system-ui,sans-serif}summary{cursor:pointer;margin:6px 0}"""
COLORS = ("#1f6fb4", "#d9650f", "#2a8f3c", "#a03ca0", "#b02a2a", "#5a5a5a")
WIDE, HIGH, LEFT, BOTTOM = 440, 230, 58, 34  # of a chart, in pixels; the margins of its axes


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from low to high."""
    raw = (high - low) / 5 or 1.0
    step = next(
        m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10) if m * 10 ** math.floor(math.log10(raw)) >= raw
    )
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, x_name: str, lines: dict[str, list[tuple]], bars: list[list] = (), log_x: bool = False) -> str:
    """An SVG of lines {name: [(x, y), ...]} or of bars [from, to, height]; y starts at 0, points without y are gaps."""
    lines = {name: sorted((x, y) for x, y in points if y is not None) for name, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points] + [x for bar in bars for x in bar[:2]]
    if not xs:
        return ""
    top = max([y for points in lines.values() for _, y in points] + [bar[2] for bar in bars]) or 1
    low, high = min(xs), max(xs)
    scale = math.log if log_x and low > 0 else float
    span = (scale(high) - scale(low)) or 1

    def at(x: float, y: float) -> str:
        across = (WIDE - LEFT - 12) * (scale(x) - scale(low)) / span
        return f"{LEFT + across:.1f},{HIGH - BOTTOM - (HIGH - BOTTOM - 24) * y / top:.1f}"

    out = [f'<svg width="{WIDE}" height="{HIGH}" role="img"><text x="{LEFT}" y="14">{html.escape(title)}</text>']
    for y in ticks(0, top):
        x0, y0 = at(low, y).split(",")
        out.append(f'<line x1="{x0}" x2="{WIDE - 12}" y1="{y0}" y2="{y0}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 4}" y="{y0}" dy="4" text-anchor="end">{y:g}</text>')
    marks = sorted(set(xs)) if scale is math.log and not bars and len(set(xs)) < 12 else None
    if marks is None and scale is math.log:
        marks = [m * 10**e for e in range(-3, 8) for m in (1, 2, 5) if low <= m * 10**e <= high] or [low, high]
    for x in marks or ticks(low, high):
        out.append(f'<text x="{at(x, 0).split(",")[0]}" y="{HIGH - BOTTOM + 14}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{WIDE - 12}" y="{HIGH - 4}" text-anchor="end">{html.escape(x_name)}</text>')
    for left, right, height in bars:
        (x0, y0), (x1, y1) = (map(float, at(*p).split(",")) for p in ((left, height), (right, 0)))
        box = f'x="{x0:.1f}" y="{y0:.1f}" width="{max(1.0, x1 - x0 - 1):.1f}" height="{y1 - y0:.1f}"'
        out.append(f'<rect {box} fill="{COLORS[0]}"><title>{left:g} to {right:g}: {height:g}</title></rect>')
    for color, points in zip(itertools.cycle(COLORS), lines.values(), strict=False):
        # Repeated runs: a point for each, the line through their medians.
        medians = [(x, statistics.median(y for _, y in same)) for x, same in itertools.groupby(points, lambda p: p[0])]
        path = " ".join(at(*point) for point in medians)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in points:
            cx, cy = at(x, y).split(",")
            out.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{color}"><title>{x:g}: {y:g}</title></circle>')
    keys = "".join(
        f'<tspan fill="{c}" dx="8">{html.escape(n)}</tspan>'
        for c, n in zip(itertools.cycle(COLORS), lines, strict=False)
    )
    return "".join(out) + f'<text x="{WIDE - 12}" y="14" text-anchor="end">{keys}</text></svg>'


def page(about: dict, rows: list[dict]) -> str:
    """One HTML file that needs no other: the settings, the table, charts against load, and each level's own charts."""
    cell = html.escape
    out = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Rerank benchmark</title>']
    out.append(f"<style>{STYLE}</style></head><body><h1>Rerank benchmark</h1><table>")
    out.append("<tr>" + "".join(f"<th>{cell(name)}</th>" for name in COLUMNS) + "</tr>")
    for row in rows:
        cells = table_cells(row | {"errors": error_cell(row)})
        out.append("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in cells) + "</tr>")
    out.append("</table><h2>Against load</h2>")
    for mode, x_name in (("closed", "calls in flight"), ("open", "calls a second")):
        chosen = [row for row in rows if row["mode"] == mode]
        levels = {row["level"] for row in chosen}
        if len(levels) < 2:
            continue
        log_x = max(levels) > 8 * min(levels)
        names = sorted({row["endpoint"] for row in chosen})
        points = {n: [(r["level"], r["pairs/s"]) for r in chosen if r["endpoint"] == n] for n in names}
        out.append(chart("pairs/s", x_name, points, log_x=log_x))
        for name in names:
            own = [row for row in chosen if row["endpoint"] == name]
            points = {p: [(row["level"], row[f"{p}_ms"]) for row in own] for p in ("p50", "p95", "p99")}
            out.append(chart(f"{name}: latency, ms", x_name, points, log_x=log_x))
    out.append("<h2>Each level</h2>")
    for row in rows:
        level = f"{row['endpoint']} {row['mode']} {row['level']:g}, run {row['run']}"
        out.append(f"<details><summary>{cell(level)}: <b>{cell(row['bound'])}</b>: {cell(row['verdict'])}</summary>")
        out += [f"<p>{cell(text)}</p>" for text in doubts(row)]
        out.append(f"<p>{cell(', '.join(f'{name} {row[name]:g}' for name in SEEN if row[name] is not None))}</p>")
        time, bars = row["series"]["timeline"], row["series"]["histogram"]
        out.append(chart("calls by latency", "ms", {}, bars, log_x=True))
        for title, names in (("pairs/s over time", ["pairs/s"]), ("latency over time, ms", ["p50_ms", "max_ms"])):
            out.append(chart(title, "s", {n: [(part["t_s"], part[n]) for part in time] for n in names}))
        out.append("</details>")
    out.append('<h2>To repeat it</h2><table class="text">')
    for name, value in about.items():
        out.append(f"<tr><td>{cell(name)}</td><td>{cell('unknown' if value is None else str(value))}</td></tr>")
    return "\n".join(out) + "</table></body></html>\n"
