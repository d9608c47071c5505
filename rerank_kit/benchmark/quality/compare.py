"""Do two quality runs differ by more than chance, and what does the quality cost?"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rerank_kit.benchmark.compare import apart
from rerank_kit.benchmark.load import say
from rerank_kit.benchmark.page import replace_file
from rerank_kit.benchmark.quality import metrics
from rerank_kit.benchmark.quality.judgements import FEW_QUERIES
from rerank_kit.benchmark.quality.page import compare_page

# What may differ between two runs, and is said where it does.
SETTINGS = (
    "judgements_sha256", "first_stage", "relevant_grade", "unjudged", "model", "model_root", "profile", "vllm",
    "server_flags", "hardware", "instruction", "long_documents", "max_tokens_per_doc", "versions",
)  # fmt: skip
SURE = 0.05


@dataclass
class Outcome:
    """What a comparison found."""

    lines: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)  # measurable losses of more than --fail-over
    untold: list[str] = field(default_factory=list)  # why the gate cannot judge
    gains: dict[str, list[float]] = field(default_factory=dict)  # of the main metric, each query


def is_quality(out: object) -> bool:
    """True for the contents of a file that --quality wrote."""
    return isinstance(out, dict) and out.get("kind") == "quality"


def compare(base: dict[str, Any], other: dict[str, Any], fail_over: float | None = None, title: str = "") -> Outcome:
    """Paired comparison of two runs, query by query.

    The gate looks at the main metric (nDCG) alone: of four metrics one often differs by chance. It fails on a loss that
    the paired test finds (p < 0.05) and that is more than fail_over percent of base's mean.
    """
    out = Outcome()
    for name in SETTINGS:
        if base.get(name) != other.get(name):
            out.lines.append(f"differs: {name}: {apart(base.get(name), other.get(name))}")
    for name, run in (("one", base), ("other", other)):
        if not run["metrics"]:
            out.untold.append(f"the {name} run has no metrics")
        if run["failed_queries"] or run["interrupted"]:
            out.untold.append(f"the {name} run is not whole ({run['failed_queries']} failed queries)")
    if base["relevant_grade"] != other["relevant_grade"] or base["unjudged"] != other["unjudged"]:
        out.untold.append("--relevant or --unjudged differ")
    values = [{(q["id"], q["query"]): q["values"] for q in run["queries"]} for run in (base, other)]
    both = [key for key in values[0] if key in values[1]]
    if only := len(values[0]) + len(values[1]) - 2 * len(both):
        out.lines.append(f"{only} queries are in one run only and are left out; {len(both)} are in both")
        out.untold.append(f"{only} queries are in one run only")
    if len(both) < FEW_QUERIES:
        out.untold.append(f"{len(both)} common queries, {FEW_QUERIES} or more are needed")
    names = [r["metric"] for r in base["metrics"] if r["metric"] in {o["metric"] for o in other["metrics"]}]
    if not names or not both:
        out.untold.append("no common metric or query")
        return out
    for name in names:
        pairs = [(values[0][key][name], values[1][key][name]) for key in both]
        gains = [b - a for a, b in pairs]
        mean = math.fsum(a for a, _ in pairs) / len(pairs)
        gain, p, seed = math.fsum(gains) / len(gains), metrics.p_value(gains, base["seed"]), base["seed"]
        span = metrics.interval(gains, seed)
        text = f"{name} {mean:.4f} -> {mean + gain:.4f}: "
        sure = p is not None and p < SURE and gain != 0
        if not any(gains):
            text += "the same in every query"
        else:
            text += ("better" if gain > 0 else "worse") if sure else "no measurable difference"
            percent = f"{100 * gain / mean:+.1f} %" if mean else "from 0"
            edges = f", 95 %: {span[0]:+.4f} to {span[1]:+.4f}" if span else ""
            wins, losses = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
            text += f" ({gain:+.4f} = {percent}{edges}"
            text += f"; p {p:.4f}" if p is not None else "; no test"
            text += f"; {wins} queries better, {losses} worse, {len(gains) - wins - losses} equal)"
        out.lines.append(text)
        if name != names[0]:
            continue
        out.gains[title or "gain"] = gains
        if fail_over is None:
            continue
        if sure and mean and -100 * gain / mean > fail_over:
            out.worse.append(text)
        elif span and mean and -100 * span[0] / mean > fail_over:
            out.lines.append(f"a loss of up to {-100 * span[0] / mean:.1f} % cannot be excluded with these queries")
    return out


def frontier(runs: dict[str, dict[str, Any]], speeds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Quality, pairs/s and cost of each quality run.

    A load test (bench_rerank.py --json) belongs to the quality runs of the same model_root and server_flags; its best
    row counts. Without one the speed is that of the quality run itself, at its own concurrency.
    """
    rows = []
    for name, run in runs.items():
        first = run["metrics"][0] if run["metrics"] else {}
        row = {"run": name, **{key: first.get(key) for key in ("metric", "value", "low", "high")}}
        row |= {"pairs/s": run["pairs/s"], "speed_from": "the quality run", "cost_per_million": None}
        for speed_name, speed in speeds.items():
            if all(speed.get(key) == run.get(key) for key in ("model_root", "server_flags")):
                whole = [r for r in speed["rows"] if r["ok"] and not r["interrupted"] and r["pairs/s"]]
                if whole:
                    row |= {"pairs/s": max(r["pairs/s"] for r in whole), "speed_from": speed_name}
                    price = speed.get("price_per_hour")
                    row["cost_per_million"] = price / 3600 / row["pairs/s"] * 1e6 if price else None
        rows.append(row)
    return rows


def run_compare(
    names: Sequence[str], outs: Sequence[dict[str, Any]], fail_over: float | None, page: str | None = None
) -> int:
    """Compare quality runs with the first one, beside load tests. 1 = a loss over fail_over %, 2 = cannot be judged."""
    if missing := [p for p in metrics.missing_packages() if not p.startswith("bm25s")]:
        say(f"[ERR] --compare of quality needs: {sys.executable} -m pip install {' '.join(missing)}")
        return 2
    runs = {name: out for name, out in zip(names, outs, strict=True) if is_quality(out)}
    speeds = {name: out for name, out in zip(names, outs, strict=True) if not is_quality(out)}
    base, *others = runs
    shown = ["differences of each query: 95 % interval by bootstrap, p of a paired test by random signs"]
    print(f"# {shown[0]}")
    code = 0
    gains: dict[str, list[float]] = {}
    for name in others:
        print(f"# {base} -> {name}")
        found = compare(runs[base], runs[name], fail_over, f"{base} -> {name}")
        print("\n".join(found.lines))
        shown += [f"{base} -> {name}", *found.lines]
        gains |= found.gains
        if fail_over is not None and found.untold:
            say(f"[ERR] --fail-over cannot judge {name}: {'; '.join(found.untold)}")
            code = code or 2
        for text in found.worse:
            say(f"[ERR] loss of more than {fail_over:g} %: {text}")
            code = 1
    if not others and fail_over is not None:
        say("[ERR] --fail-over needs two quality runs or more")
        code = 2
    rows = frontier(runs, speeds)
    print("# quality and speed")
    for row in rows:
        value = "-" if row["value"] is None else f"{row['metric']} {row['value']:.4f}"
        if row["low"] is not None:
            value += f" ({row['low']:.4f} to {row['high']:.4f})"
        speed = "-" if row["pairs/s"] is None else f"{row['pairs/s']:.1f} pairs/s"
        cost = "" if row["cost_per_million"] is None else f", {row['cost_per_million']:.2f} per million pairs"
        shown.append(f"{row['run']}: {value}, {speed} ({row['speed_from']}){cost}")
        print(shown[-1])
    used = {row["speed_from"] for row in rows}
    for name in speeds:
        if name not in used:
            say(f"[WARN] {name}: a load test of no model_root and server_flags among the quality runs: not used")
    if page:
        metric = next((row["metric"] for row in rows if row["metric"]), "")
        replace_file(Path(page), compare_page(shown, rows, gains, metric))
    return code
