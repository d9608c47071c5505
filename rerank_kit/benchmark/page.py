"""The files of a benchmark: JSON, CSV, and one HTML page with charts."""

import csv
import html
import io
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rerank_kit.benchmark.report import COLUMNS, doubts, error_cell, table_cells
from rerank_kit.benchmark.server_view import SEEN

STYLE = """body{font:14px system-ui,sans-serif;margin:2em;max-width:75em;color:#222}table{border-collapse:collapse}
td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,.text td{text-align:left}
svg{background:#fafafa;margin:4px}svg text{font:11px system-ui,sans-serif}summary{cursor:pointer;margin:6px 0}"""
COLORS = ("#1f6fb4", "#d9650f", "#2a8f3c", "#a03ca0", "#b02a2a", "#5a5a5a")
SIDES = ("present", "best")  # of the proof of --tune
WIDE, HIGH, LEFT, BOTTOM = 440, 230, 58, 34  # of a chart, in pixels; the margins of its axes


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from low to high."""
    raw = (high - low) / 5 or 1.0
    step = next(
        m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10) if m * 10 ** math.floor(math.log10(raw)) >= raw
    )
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str, x_name: str, lines: dict[str, list[tuple]], bars: Sequence[list] = (), log_x: bool = False
) -> str:
    """An SVG of lines {name: [(x, y), ...]} or bars [from, to, height]; points without y are gaps.

    y starts at 0, or at the lowest value where that is less.
    """
    lines = {name: sorted((x, y) for x, y in points if y is not None) for name, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points] + [x for bar in bars for x in bar[:2]]
    if not xs:
        return ""
    ys = [0.0, *(y for points in lines.values() for _, y in points), *(bar[2] for bar in bars)]
    top, floor = max(ys) or (0.0 if min(ys) < 0 else 1.0), min(ys)
    low, high = min(xs), max(xs)
    scale = math.log if log_x and low > 0 else float
    span = (scale(high) - scale(low)) or 1

    def at(x: float, y: float) -> str:
        across = (WIDE - LEFT - 12) * (scale(x) - scale(low)) / span
        return f"{LEFT + across:.1f},{HIGH - BOTTOM - (HIGH - BOTTOM - 24) * (y - floor) / (top - floor):.1f}"

    out = [f'<svg width="{WIDE}" height="{HIGH}" role="img"><text x="{LEFT}" y="14">{html.escape(title)}</text>']
    for y in ticks(floor, top):
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
        (x, y), (x1, y1) = (map(float, at(*p).split(",")) for p in ((left, max(height, 0)), (right, min(height, 0))))
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(1.0, x1 - x - 1):.1f}" height="{y1 - y:.1f}"'
        out.append(f'<rect {box} fill="{COLORS[0]}"><title>{left:g} to {right:g}: {height:g}</title></rect>')
    for color, points in zip(itertools.cycle(COLORS), lines.values(), strict=False):
        # Repeated runs: one point per run; the line connects their medians.
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


def compare_page(runs: dict[str, dict], lines: list[str]) -> str:
    """One HTML file: the findings of a comparison, and charts of all runs {name: contents of --json} together."""
    cell = html.escape
    out = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Rerank benchmark: comparison</title>']
    out.append(f"<style>{STYLE}</style></head><body><h1>Comparison</h1>")
    out += [f"<p>{cell(line)}</p>" for line in lines]
    rows = [row for run in runs.values() for row in run["rows"]]
    for endpoint, mode in sorted({(row["endpoint"], row["mode"]) for row in rows}):
        levels = {row["level"] for row in rows if (row["endpoint"], row["mode"]) == (endpoint, mode)}
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
    return "\n".join(out) + "</body></html>\n"


def page(about: dict, rows: list[dict]) -> str:
    """One HTML file that needs no other: the settings, the table, charts against load, and each level's own charts."""
    cell = html.escape
    out = ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Rerank benchmark</title>']
    out.append(f"<style>{STYLE}</style></head><body><h1>Rerank benchmark</h1><table>")
    out.append("<tr>" + "".join(f"<th>{cell(name)}</th>" for name in COLUMNS) + "</tr>")
    for row in rows:
        cells = table_cells(row | {"errors": error_cell(row)})
        out.append("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in cells) + "</tr>")
    out.append("</table>")
    out += [f"<p>{cell(text)}</p>" for text in about.get("findings") or ()]
    out += tuning(about["tune"]) if about.get("tune") else []
    out.append("<h2>Against load</h2>")
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
        if name in ("tune", "findings"):
            continue
        out.append(f"<tr><td>{cell(name)}</td><td>{cell('unknown' if value is None else str(value))}</td></tr>")
    return "\n".join(out) + "</table></body></html>\n"


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
