"""Rows of the result table, and the verdict on what limited each."""

import math
from collections import Counter
from typing import Any

from rerank_kit.benchmark.load import Call, Level
from rerank_kit.benchmark.server_view import SEEN, gpus_of

# fmt: off
COLUMNS = {"endpoint": 8, "mode": 6, "level": 6, "ok": 6, "refused": 7, "err": 5, "req/s": 7, "pairs/s": 8, "tok/s": 8,
           "p50_ms": 7, "p90_ms": 7, "p95_ms": 7, "p99_ms": 7, "max_ms": 7, "bound": 6, "errors": 0}  # name: width
# fmt: on
REFUSED = ("http_429", "http_503")  # the server sheds load; not a fault

# --- rows ---


def percentile(values: list[float], p: int) -> float | None:
    """Nearest-rank percentile of sorted values; None with fewer than 100 / (100 - p) of them."""
    n = len(values)
    return None if n * (100 - p) < 100 else values[-(-n * p // 100) - 1]


def summarise(level: Level, seen: dict | None = None) -> dict:
    """Row of one level: the table's columns by their names, then further fields that explain them.

    Args:
        seen: measurements of the server inside the window, by the names in SEEN.
    """
    opened, closed = level.opened or 0.0, level.closed or 0.0
    measured = [c for c in level.calls if c.measured]
    good = [c for c in measured if c.error is None]
    errors = Counter(c.error for c in measured if c.error)
    refused = sum(errors[kind] for kind in REFUSED)
    latencies = sorted((c.end - c.due) * 1000 for c in good)
    window_s = closed - opened
    inside = [c for c in level.calls if c.error is None and opened < c.end <= closed]
    per_s = 1 / window_s if window_s > 0 else 0.0
    lags_ms = sorted(s * 1000 for s in level.lags_s)
    # A very late loop wakes up too rarely for a percentile; then its largest lag is used.
    lag_ms = percentile(lags_ms, 95) or max(lags_ms, default=None)
    tokens = sum(c.tokens for c in inside)
    row: dict[str, Any] = {"endpoint": level.endpoint, "mode": level.mode, "level": level.level, "ok": len(good)}
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
    # A late client adds its lag to each latency. Up to a tenth of p50 or 2 ms, the lag is ignored.
    late = lag_ms is not None and row["p50_ms"] is not None and lag_ms > max(2.0, 0.1 * row["p50_ms"])
    row["client_limited"] = level.cpu > 0.9 or late
    missed = sum(ms > level.slo_ms for ms in latencies) + errors.total() if level.slo_ms else None
    row |= {"slo_missed": missed, "slo_held": None, **dict.fromkeys(SEEN), **(seen or {})}
    row["bound"], row["verdict"] = verdict(row)
    row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    return row | {"series": {"histogram": histogram(latencies), "timeline": timeline(level)}}


def histogram(latencies: list[float]) -> list[list]:
    """[from_ms, to_ms, calls] of sorted latencies. Latencies span decades, so bins have equal ratios (>= 1.05)."""
    if not latencies:
        return []
    low, high = max(latencies[0], 0.001), max(latencies[-1], 0.001)
    ratio = max((high / low) ** (1 / 24), 1.05)
    counts = Counter(int(math.log(max(ms, low) / low, ratio)) for ms in latencies)
    return [[round(low * ratio**i, 3), round(low * ratio ** (i + 1), 3), counts[i]] for i in range(max(counts) + 1)]


def timeline(level: Level) -> list[dict]:
    """Answers, failures and latencies in each of 40 equal parts of the window."""
    out = []
    opened, closed = level.opened or 0.0, level.closed or 0.0
    part_s = (closed - opened) / 40
    parts: list[list[Call]] = [[] for _ in range(40)]
    for call in level.calls:
        if part_s > 0 and opened < call.end <= closed:
            parts[min(39, int((call.end - opened) / part_s))].append(call)
    for i, calls in enumerate(parts):
        ms = sorted((c.end - c.due) * 1000 for c in calls if c.error is None)
        pairs = sum(c.pairs for c in calls if c.error is None)
        at: dict[str, float | None] = {
            "t_s": (i + 0.5) * part_s,
            "pairs/s": pairs / part_s if part_s > 0 else 0.0,
            "failed": len(calls) - len(ms),
        }
        at |= {"p50_ms": ms[len(ms) // 2] if ms else None, "max_ms": ms[-1] if ms else None}
        out.append({k: round(v, 3) if isinstance(v, float) else v for k, v in at.items()})
    return out


def verdict(row: dict) -> tuple[str, str]:
    """What limits a row: one word for the table, and the reason with the setting to change.

    Reads ok, refused, err, mode, p50_ms, the client_ fields, and SEEN. A GPU or a core counts as busy from 85 % of
    the time, since every window has gaps.
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
            return "refuse", "every call was refused: send fewer calls, or see MAX_WAIT_S and MAX_PAIRS_IN_FLIGHT"
        return "none", "no call succeeded: see the errors"
    if row["client_limited"]:
        late = f"{row['client_lag_ms'] or 0:.1f} ms late"
        busy = f"a client process used {row['client_cpu']:.0%} of a core and was {late}, so the service may be faster"
        if row["client_cpu"] < 0.25 or (host or 0) >= 0.9:  # it waits for a core, and more processes would wait too
            return "client", f"{busy}: run the client on a host of its own"
        return "client", f"{busy}: raise --processes, or run the client on another host"
    if gpu is not None and gpu >= 85:
        less = "try QUANTIZATION=fp8, shorter documents (MAX_TOKENS_PER_DOC), or more GPUs (DP)"
        return "gpu", f"the busiest GPU was busy {gpu:.0f} % of the time: {less}"
    if api is not None and api >= 0.85:
        more = "raise API_SERVER_COUNT or set VLLM_USE_FASTOKENS=1; more GPUs do not help"
        return "cpu", f"an API process (HTTP, tokenizing) used {api:.2f} cores: {more}"
    engine = row["engine_cpu"]
    if gpu is not None and engine is not None and engine >= 0.85:
        # Not on a CPU, where the engine runs the model and is expected to be busy.
        one = "one engine process cannot keep this GPU busy with a model this small; each GPU of DP adds an engine"
        return "engine", f"the engine process used {engine:.2f} cores, the GPU was busy {gpu:.0f} % of the time: {one}"
    if host is not None and host >= 0.9:
        ours = (row["server_cpu"] or 0.0) + row["client_cpu"] * row["client_processes"]
        if row["server_cpu"] is not None and ours < 0.5 * host * row["host_cores"]:
            busy = f"server and client used only {ours:.1f} of this host's {row['host_cores']} busy cores"
            return "other", f"{busy}: measure while nothing else runs"
        more = "add cores, or a GPU if the model runs on the CPU"
        return "cpu", f"all cores of this host were busy ({host:.0%}): {more}"
    if gpu is None and api is None:
        return "?", "neither GPU nor server processes are visible from here: run the benchmark on the server's host"
    shown = ((gpu, "GPU {:.0f} %"), (api, "API process {:.2f} cores"))
    seen = ", ".join(text.format(value) for value, text in shown if value is not None)
    if queue_ms is not None and row["p50_ms"] and queue_ms > 0.3 * row["p50_ms"]:
        waited = f"pairs waited {queue_ms:.0f} ms for the engine while nothing was busy ({seen})"
        return "engine", f"{waited}; its steps are too small: raise MAX_NUM_SEQS or MAX_NUM_BATCHED_TOKENS"
    if (gpu or 0) < 50 and (api or 0) < 0.5:
        return "idle", f"the service had spare capacity ({seen}): try {load}"
    return "mixed", f"nothing was busy all the time ({seen}): try {load}, then API_SERVER_COUNT"


def doubts(row: dict) -> list[str]:
    """Reasons not to trust a row; empty = none known."""
    out = []
    if row["warmup_err"]:
        out.append(f"{row['warmup_err']} calls of the warm-up failed")
    if (row["p50_ms"] or 0) > 1000 * row["window_s"]:
        out.append(f"p50 is longer than the window of {row['window_s']:.1f} s: raise --seconds or --requests")
    if row["client_limited"]:
        late = f"{row['client_cpu']:.0%} of one core, {row['client_lag_ms'] or 0:.1f} ms late"
        out.append(f"the client was the bottleneck ({late}), so the service may be faster")
    return out


def calls_of(row: dict) -> int:
    """Calls that were sent (open loop: due) inside the window."""
    return row["ok"] + row["refused"] + row["err"]


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


# --- cost and comparison ---


def cost_lines(about: dict, rows: list[dict], price_per_hour: float | None, targets: list[float] | None) -> list[str]:
    """What a million pairs cost at each level, and how many GPUs each target rate (pairs/s) needs."""
    gpus, services, out = gpus_of(about.get("server_flags")), about.get("services", 1), []
    these = "these services" if services > 1 else "this service"
    unit, each = ("GPUs", gpus * services) if gpus else (f"copies of {these}", 1)
    for row in rows:
        cells = [f"{row['endpoint']} {row['mode']} {row['level']:g}: {row['pairs/s']:.1f} pairs/s"]
        cells.append("p95 -" if row["p95_ms"] is None else f"p95 {row['p95_ms']:.3g} ms")
        if price_per_hour is not None:
            price = row["pairs/s"] and price_per_hour / 3600 / row["pairs/s"] * 1e6
            cells.append(f"{price:.2f} per million pairs" if price else "no pair was scored")
        for target in targets or []:
            need = row["pairs/s"] and math.ceil(target / row["pairs/s"]) * each
            cells.append(f"{need} {unit} for {target:g} pairs/s" if need else f"{target:g} pairs/s cannot be reached")
        out.append(", ".join(cells + ["an upper bound: the client was the bottleneck"] * row["client_limited"]))
    if price_per_hour is not None:
        out.append(f"assumed: the whole service costs {price_per_hour:g} per hour and is busy all the time")
    if targets:
        size = f"{each} GPU each" if gpus else "GPUs are not visible from here: run the benchmark on the server's host"
        out.append(
            f"assumed: copies of {these} ({size}), each as fast and as loaded as in this "
            "row, with its own CPU cores and memory, and calls spread evenly; no reserve for peaks or a failed copy"
        )
    return out
