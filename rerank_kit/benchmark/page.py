"""The files of a benchmark: JSON, CSV, and one HTML page with charts."""

import csv
import html
import io
import json
import re
import statistics
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from rerank_kit.benchmark.charts import STYLE, chart, head
from rerank_kit.benchmark.report import COLUMNS, doubts, error_cell, table_cells
from rerank_kit.benchmark.server_view import SEEN

__all__ = ["STYLE", "chart", "compare_page", "page", "write_files"]

SIDES = ("present", "best")  # of the proof of --tune
WORDS = """closed: that many calls in flight, each caller waits for its answer; open: that many calls due a second,
whatever the service does. Level: that number. bound: what limited the row. -: too few calls for this percentile
(p99 needs 100). refused: 429 and 503, by which the guard protects the service. pairs/s counts good answers only."""


def tuning(state: dict) -> list[str]:
    """The search of --tune: every candidate with its result and cost, a chart of them, and the turns of the proof."""
    head = ("", "settings", "measured", "windows", "outcome", "score difference", "start, s", "measuring, s")
    out = ["<h2>Settings tried</h2><table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    best: float | None = 0.0
    points: dict[str, list[tuple]] = {"each window": [], "best so far": []}
    for n, one in enumerate(state["tried"], 1):
        mean = statistics.mean(one["values"]) if one["values"] else None
        best = mean if one["outcome"] in ("start", "better") else best
        points["each window"] += [(n, value) for value in one["values"]]
        points["best so far"].append((n, best))
        shown = "-" if mean is None else f"{mean:.4g}"
        apart = "-" if one["score_difference"] is None else f"{one['score_difference']:.2g}"
        outcome = f"{one['outcome']}: {one['why']}" if one["why"] else one["outcome"]
        cells = [n, one["label"], shown, len(one["values"]), outcome, apart]
        cells += [f"{one['restart_s']:.0f}", f"{one['measure_s']:.0f}"]
        out.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    out.append("</table>" + chart(f"{state['unit']} of each candidate", "candidate", points))
    if state["turns"]:
        turns = {s: [(n, t["value"]) for n, t in enumerate(state["turns"], 1) if t["side"] == s] for s in SIDES}
        out.append(chart(f"{state['unit']}, best and present settings in turns", "turn", turns))
    return out


def label(row: dict) -> str:
    return f"{row['endpoint']} {row['mode']} {row['level']:g}"


def load_of(row: dict) -> str:
    return f"{row['level']:g} calls in flight" if row["mode"] == "closed" else f"{row['level']:g} calls/s"


def cards(about: dict, rows: list[dict]) -> list[str]:
    """What a reader wants to know first: throughput, latency at light load, what bounds it, cost."""
    good = [row for row in rows if row["ok"]]
    if not good:
        return []
    held = [row for row in good if row.get("slo_held")]
    top = max(held or good, key=lambda row: row["pairs/s"])
    light = min((row for row in good if row["endpoint"] == top["endpoint"]), key=lambda row: row["level"])
    slo = re.search(r"(p\d+ <= [\d.]+ ms)", " ".join(about.get("findings") or ()))
    what = f"pairs/s at {slo[1]}" if held and slo else "pairs/s at most"
    out = [(f"{top['pairs/s']:,.0f}", what, f"{label(top).split()[0]}, {load_of(top)}, {top['req/s']:.3g} calls/s")]
    for name in ("p50_ms", "p95_ms"):
        if light[name] is not None:
            out.append((f"{light[name]:.3g} ms", f"{name[:3]} at light load", f"{light['endpoint']}, {load_of(light)}"))
    out.append((top["bound"], "bounds it", top["verdict"]))
    for line in about.get("findings") or ():
        if line.startswith(label(top) + ": ") and (cost := re.search(r"([\d.]+) per million pairs", line)):
            out.append((cost[1], "per million pairs", "the service busy all the time"))
    cell = html.escape
    return [
        f'<div class="card"><b>{cell(big)}</b>{cell(name)}<div class="note">{cell(more)}</div></div>'
        for big, name, more in out
    ]


def curve(rows: Iterable[dict], column: str) -> list[tuple]:
    """(pairs/s, latency) of each level, in the order of load: the medians of its runs."""
    out = []
    by_level: dict[float, list[dict]] = {}
    for row in rows:
        if row[column] is not None and not row["interrupted"]:
            by_level.setdefault(row["level"], []).append(row)
    for _, same in sorted(by_level.items()):
        out.append(tuple(statistics.median(row[name] for row in same) for name in ("pairs/s", column)))
    return out


def compare_page(runs: dict[str, dict], lines: list[str]) -> str:
    """One HTML file: the findings of a comparison, and charts of all runs {name: contents of --json} together."""
    cell = html.escape
    out = [head("Rerank benchmark: comparison") + "<h1>Comparison</h1>"]
    out += [f"<p>{cell(line)}</p>" for line in lines]
    out.append('<div class="charts">')
    rows = [row for run in runs.values() for row in run["rows"]]
    for endpoint, mode in sorted({(row["endpoint"], row["mode"]) for row in rows}):
        levels = {row["level"] for row in rows if (row["endpoint"], row["mode"]) == (endpoint, mode)}
        overlays = {
            title: curve((r for r in run["rows"] if (r["endpoint"], r["mode"]) == (endpoint, mode)), "p50_ms")
            for title, run in runs.items()
        }
        out.append(chart(f"{endpoint} {mode}: p50, ms", "pairs/s", overlays, from_zero=True, in_order=True))
        for name in ("pairs/s", "p50_ms", "p95_ms"):
            points = {}
            for title, run in runs.items():
                own = [
                    r for r in run["rows"] if (r["endpoint"], r["mode"]) == (endpoint, mode) and not r["interrupted"]
                ]
                points[title] = [(r["level"], r[name]) for r in own]
            x_name = "calls in flight" if mode == "closed" else "calls a second"
            log_x = max(levels) > 8 * min(levels)
            out.append(chart(f"{endpoint} {mode}: {name}", x_name, points, log_x=log_x))
    return "\n".join(out) + "</div></body></html>\n"


def page(about: dict, rows: list[dict]) -> str:
    """One HTML file that needs no other: headline numbers, charts against load, the table, each level, the settings."""
    cell = html.escape
    out = [head("Rerank benchmark") + "<h1>Rerank benchmark</h1>"]
    facts = [about.get("model_root") or about.get("model"), about.get("hardware"), about.get("texts")]
    facts += [f"vLLM {about['vllm']}" if about.get("vllm") else None, about.get("date")]
    out.append(f'<p class="dim">{cell(" · ".join(str(fact) for fact in facts if fact))}</p>')
    out += ['<div class="cards">', *cards(about, rows), "</div>", '<div class="charts">', *load_charts(rows), "</div>"]
    out.append('<h2>All levels</h2><div class="wide"><table><tr>')
    out.append("".join(f"<th>{cell(name)}</th>" for name in COLUMNS) + "</tr>")
    for row in rows:
        cells = zip(COLUMNS, table_cells(row | {"errors": error_cell(row)}), strict=True)
        kinds = {"bound": f' class="{cell(str(row["bound"]))}"'}
        out.append("<tr>" + "".join(f"<td{kinds.get(name, '')}>{cell(c)}</td>" for name, c in cells) + "</tr>")
    out.append(f'</table></div><p class="note words">{cell(WORDS)}</p>')
    verdicts = {f"{label(row)}: {row['bound']}: {row['verdict']}" for row in rows}  # each is told at its level
    out += [f"<p>{cell(text)}</p>" for text in about.get("findings") or () if text not in verdicts]
    out += tuning(about["tune"]) if about.get("tune") else []
    out.append('<h2 class="each">Each level</h2>')
    for row in rows:
        level = f"{label(row)}, run {row['run']}"
        out.append(f"<details><summary>{cell(level)}: <b>{cell(row['bound'])}</b>: {cell(row['verdict'])}</summary>")
        out += [f"<p>{cell(text)}</p>" for text in doubts(row)]
        seen = ", ".join(f"{name} {row[name]:g}" for name in SEEN if row[name] is not None)
        out.append(f'<p class="note">{cell(seen)}</p><div class="charts">')
        time, bars = row["series"]["timeline"], row["series"]["histogram"]
        out.append(chart("calls by latency", "ms", {}, bars, log_x=True))
        for title, names in (("pairs/s over time", ["pairs/s"]), ("latency over time, ms", ["p50_ms", "max_ms"])):
            lines = {n: [(part["t_s"], part[n]) for part in time] for n in names}
            out.append(chart(title, "s", lines, from_zero=True))
        out.append("</div></details>")
    out.append('<div class="repeat"><h2>To repeat it</h2><table class="text">')
    for name, value in about.items():
        if name in ("tune", "findings") or value in ({}, [], ""):
            continue
        shown = "unknown" if value is None else json.dumps(value, indent=1) if isinstance(value, dict) else str(value)
        out.append(f"<tr><td>{cell(name)}</td><td><pre>{cell(shown)}</pre></td></tr>")
    return "\n".join(out) + "</table></div></body></html>\n"


def load_charts(rows: list[dict]) -> list[str]:
    """Latency over throughput, then both over load, for every mode with two levels or more."""
    out = []
    for mode, x_name in (("closed", "calls in flight"), ("open", "calls a second")):
        chosen = [row for row in rows if row["mode"] == mode]
        levels = {row["level"] for row in chosen}
        if len(levels) < 2:
            continue
        log_x = max(levels) > 8 * min(levels)
        own = {
            name: [row for row in chosen if row["endpoint"] == name] for name in sorted({r["endpoint"] for r in chosen})
        }
        both = {f"{n} {p}": curve(r, f"{p}_ms") for n, r in own.items() for p in ("p50", "p95")}
        both = {name: points for name, points in both.items() if points}
        out.append(chart("latency over throughput, ms", "pairs/s", both, from_zero=True, in_order=True))
        points = {n: [(row["level"], row["pairs/s"]) for row in of_one] for n, of_one in own.items()}
        out.append(chart("pairs/s", x_name, points, log_x=log_x))
        for name, of_one in own.items():
            points = {p: [(row["level"], row[f"{p}_ms"]) for row in of_one] for p in ("p50", "p95", "p99")}
            out.append(chart(f"{name}: latency, ms", x_name, points, log_x=log_x))
    return out


def write_files(paths: dict[str, str | None], about: dict, rows: list[dict]) -> None:
    """Write the json, csv and html files. Called after each level, so a run that dies keeps its rows."""
    if path := paths.get("json"):
        replace_file(Path(path), json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if path := paths.get("csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, [name for name in (rows or [{}])[0] if name != "series"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {"errors": error_cell(row)} for row in rows)
        replace_file(Path(path), out.getvalue())
    if path := paths.get("html"):
        replace_file(Path(path), page(about, rows))


def replace_file(path: Path, text: str) -> None:
    """Replace a file by rename, so a full disk keeps the old one. A device (/dev/stdout) is written directly."""
    if str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file()):
        path.write_text(text, "utf-8", newline="")
        return
    path = path.resolve()
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(text, "utf-8", newline="")
        scratch.replace(path)
    except OSError as exc:
        with suppress(OSError):
            scratch.unlink()
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
