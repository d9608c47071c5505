"""The HTML page of a quality run, and that of a comparison."""

import html
from collections.abc import Sequence
from typing import Any

from rerank_kit.benchmark.page import STYLE, chart

BINS = 25


def head(title: str) -> list[str]:
    return [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]


def table(names: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """An HTML table; None is shown as "-"."""

    def cell(value: object) -> str:
        text = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        return f"<td>{html.escape(text)}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{top}</tr>{body}</table>'


def shares(values: dict[str, list[float]]) -> dict[str, list[tuple[float, float]]]:
    """{name: [(score, share of its pairs in the bin around it), ...]}, in the same BINS bins for all names."""
    every = [v for part in values.values() for v in part]
    if not every:
        return {}
    low, high = min(every), max(every)
    width = (high - low) / BINS or 1.0
    out = {}
    for name, part in values.items():
        bins = [0] * BINS
        for value in part:
            bins[min(BINS - 1, int((value - low) / width))] += 1
        out[name] = [(low + (i + 0.5) * width, n / max(1, len(part))) for i, n in enumerate(bins)]
    return out


def page(out: dict[str, Any]) -> str:
    """One HTML file: metrics, gain of each query, score distributions, calibration, and what repeats the run."""
    rows, relevant = out["metrics"], out["relevant_grade"]
    parts = head("Rerank quality")
    names = ("metric", "value", "low", "high", "first_stage", "gain", "gain_low", "gain_high", "p", "best_possible")
    parts.append(table(names, [[row[name] for name in names] for row in rows]))
    parts += [f"<p>{html.escape(text)}</p>" for text in [*out["findings"], *out["warnings"]]]
    if rows:
        main = rows[0]["metric"]
        if all(q["first_stage"] for q in out["queries"]):
            gained = sorted((q["values"][main] - q["first_stage"][main], q["id"]) for q in out["queries"])[::-1]
            bars = [[i, i + 1, round(gain, 4)] for i, (gain, _) in enumerate(gained)]
            parts.append(chart(f"{main} gained over the first stage, each query", "queries, best gain first", {}, bars))
        values = sorted((q["values"][main] for q in out["queries"]), reverse=True)
        parts.append(chart(f"{main} of each query", "queries, best first", {main: list(enumerate(values))}))
    sides: dict[str, list[float]] = {"relevant": [], "other": []}
    for one in out["scored"]:
        for score, grade in zip(one["scores"], one["grades"], strict=True):
            if grade is not None:
                sides["relevant" if grade >= relevant else "other"].append(score)
    parts.append(chart("share of the relevant and of the other documents by score", "score", shares(sides)))
    if found := out.get("calibration"):
        points = [(row["score"], row["relevant"]) for row in found["reliability"]]
        parts.append(chart("reliability: share of relevant documents by score", "mean score of a tenth", {"": points}))
    worst = sorted(out["queries"], key=lambda q: q["values"][rows[0]["metric"]])[:10] if rows else []
    if worst:
        parts.append("<h2>Worst queries</h2>")
        parts.append(
            table(["id", "query", *worst[0]["values"]], [[q["id"], q["query"], *q["values"].values()] for q in worst])
        )
    parts.append("<h2>To repeat it</h2>")
    long = ("metrics", "queries", "scored", "findings", "warnings", "calibration")
    parts.append(table(["", ""], [[k, "unknown" if v is None else v] for k, v in out.items() if k not in long], "text"))
    return "\n".join(parts) + "</body></html>\n"


def compare_page(lines: list[str], rows: list[dict[str, Any]], gains: dict[str, list[float]], metric: str) -> str:
    """One HTML file of a comparison: its lines, the frontier of quality and speed, the gain of each query."""
    parts = head("Rerank quality: comparison")
    parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    columns = ("run", "metric", "value", "low", "high", "pairs/s", "speed_from", "cost_per_million")
    parts.append(table(columns, [[row[c] for c in columns] for row in rows]))
    points = {row["run"]: [(row["pairs/s"], row["value"])] for row in rows if row["pairs/s"]}
    speeds = [x for part in points.values() for x, _ in part]
    if len(points) > 1:
        parts.append(chart(f"{metric} against speed", "pairs/s", points, log_x=max(speeds) > 8 * min(speeds)))
    for name, gained in gains.items():
        bars = [[i, i + 1, round(gain, 4)] for i, gain in enumerate(sorted(gained, reverse=True))]
        parts.append(chart(f"{metric}: {name}", "queries, best gain first", {}, bars))
    return "\n".join(parts) + "</body></html>\n"
