"""Do two runs of the benchmark differ by more than chance?"""

import math
import re
import statistics

from rerank_kit.benchmark.report import calls_of
from rerank_kit.benchmark.server_view import gpus_of

# Two-sided 95 % quantiles of Student's t for 1, 2, ... 30 degrees of freedom (any statistics textbook).
# fmt: off
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
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


def apart(a: object, b: object) -> str:
    """Two values as text. Of two long ones (arguments of the server), only the words that differ."""
    parts = [re.split(r" (?=--)", str(value)) for value in (a, b)]
    if min(map(len, parts)) < 3:
        return f"{a} -> {b}"
    one, two = ([word for word in mine if word not in other] for mine, other in (parts, parts[::-1]))
    return f"{' '.join(one) or '(nothing)'} -> {' '.join(two) or '(nothing)'}"


def compare(base: dict, other: dict, fail_over: float | None = None) -> tuple[list[str], list[str], str]:
    """Differences of two runs (contents of --json), level by level.

    Returns:
        (lines to print, regressions, what cannot be judged; empty = nothing). A regression is a measurable change for
        the worse of more than fail_over percent of base's mean, or a share of lost calls that grew by more points.
    """
    lines, worse, untold = [], [], []
    for name in SETTINGS:
        if base.get(name) != other.get(name):
            lines.append(f"differs: {name}: {apart(base.get(name), other.get(name))}")
    gpus = [(gpus_of(out.get("server_flags")) or 0) * out.get("services", 1) for out in (base, other)]
    groups: list[dict[str, list[dict]]] = [{}, {}]
    for group, out in zip(groups, (base, other), strict=True):
        for row in out["rows"]:
            if not row["interrupted"]:
                tuned = f" [{row['settings']}]" if row.get("settings") else ""
                group.setdefault(f"{row['endpoint']} {row['mode']} {row['level']:g}{tuned}", []).append(row)
    for level in [*groups[0], *(name for name in groups[1] if name not in groups[0])]:
        rows = [group.get(level, []) for group in groups]
        if not all(rows):
            lines.append(f"{level}: only in {'the other' if rows[1] else 'one'}")
            untold.append(f"{level} (only in one file)")
            continue
        few = min(map(len, rows)) < 2
        if few:
            untold.append(f"{level} (one run, use --runs)")
        for name, sign in BETTER.items():
            a, b = ([row[name] for row in runs if row[name] is not None] for runs in rows)
            if not few and (a or b) and (min(len(a), len(b)) < 2 or not statistics.mean(a)):
                why = "nothing in the first file" if len(a) > 1 and len(b) > 1 else "too few calls in some runs"
                untold.append(f"{level} {name} ({why})")
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
            if name == "pairs/s" and gpus[0] != gpus[1] and all(gpus):
                factor, grown = statistics.mean(b) / statistics.mean(a), gpus[1] / gpus[0]
                each = " -> ".join(f"{statistics.mean(v) / n:.1f}" for v, n in zip((a, b), gpus, strict=True))
                times = f"{factor:.2f} times the throughput with {grown:g} times the GPUs"
                lines.append(f"{level}: pairs/s a GPU {each}: {times}, {factor / grown:.0%} efficient")
            if fail_over is not None and sure and -change * sign > fail_over:
                worse.append(lines[-1])
        if any(row["client_limited"] for row in rows[0] + rows[1]):
            lines.append(f"{level}: the client was the bottleneck in some runs, so the difference may be wrong")
        shares = [100 * lost(runs) for runs in rows]
        if any(shares):
            lines.append(f"{level}: lost calls {shares[0]:.1f} % -> {shares[1]:.1f} %")
            if fail_over is not None and shares[1] - shares[0] > fail_over:
                worse.append(lines[-1])
    if not any(groups):
        untold.append("files without a whole row")
    return lines, worse, ", ".join(untold)
