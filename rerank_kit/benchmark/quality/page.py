"""The HTML page of a quality run, and that of a comparison."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from rerank_kit.benchmark.charts import chart, head
from rerank_kit.benchmark.quality.calibration import dependable

BINS, WORST = 25, 10
NAMES = ("metric", "value", "95 % interval", "first stage", "gain", "95 % interval", "p", "best possible")
# Of these keys None means that the run left the choice to the service, not that nobody knows.
CHOSEN = {"instruction": "the service's default", "long_documents": "the service's default"}
CHOSEN |= {"max_tokens_per_doc": "the service's default"}


def number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def span(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"{number(low, sign)} to {number(high, sign)}"


def table(names: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """An HTML table that scrolls where it is too wide; None is shown as "-"."""

    def cell(value: object) -> str:
        text = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        return f"<td>{html.escape(text)}</td>"

    top = f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in names)}</tr>" if any(names) else ""
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{top}{body}</table></div>'


def card(big: str, name: str, more: str) -> str:
    big, name, more = map(html.escape, (big, name, more))
    return f'<div class="card"><b>{big}</b>{name}<div class="note">{more}</div></div>'


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


def cards(out: dict[str, Any]) -> list[str]:
    """What a reader wants to know first: the main metric, what it gains, what is left, the threshold, the speed."""
    if not out["metrics"]:
        return []
    row = out["metrics"][0]
    known = span(row["low"], row["high"])
    found = [card(number(row["value"]), row["metric"], f"95 %: {known}" if known != "-" else "too few queries")]
    if row["gain"] is not None:
        sure = row["gain_low"] is not None and (row["gain_low"] > 0 or row["gain_high"] < 0)
        edges = f"95 %: {span(row['gain_low'], row['gain_high'], '+')}"
        more = edges if sure else f"no measurable difference; {edges}"
        found.append(card(number(row["gain"], "+"), f"over the first stage ({number(row['first_stage'])})", more))
    found.append(card(number(row["best_possible"]), "best possible", "a perfect ranking of the same candidates"))
    for target in (out.get("calibration") or {}).get("targets", ()):
        if dependable(target):
            more = f"for a {target['target']} of {target['wanted']:g}"
            found.append(card(f"{target['threshold']:g}", "MIN_SCORE", more))
    if out["pairs/s"]:
        found.append(card(f"{out['pairs/s']:,.0f}", "pairs/s", "of this run, no load test"))
    return found


def charts(out: dict[str, Any]) -> list[str]:
    found = []
    if out["metrics"]:
        main = out["metrics"][0]["metric"]
        if all(q["first_stage"] for q in out["queries"]):
            gained = sorted((q["values"][main] - q["first_stage"][main] for q in out["queries"]), reverse=True)
            bars = [[i, i + 1, round(gain, 4)] for i, gain in enumerate(gained)]
            found.append(chart(f"{main} gained over the first stage", "queries, best gain first", {}, bars))
        values = sorted((q["values"][main] for q in out["queries"]), reverse=True)
        found.append(chart(f"{main} of each query", "queries, best first", {main: list(enumerate(values))}))
    sides: dict[str, list[float]] = {"relevant": [], "other": []}
    for one in out["scored"]:
        for score, grade in zip(one["scores"], one["grades"], strict=True):
            if grade is not None:
                sides["relevant" if grade >= out["relevant_grade"] else "other"].append(score)
    found.append(chart("share of relevant and of other documents", "score", shares(sides)))
    if known := out.get("calibration"):
        points = [(row["score"], row["relevant"]) for row in known["reliability"]]
        found.append(chart("reliability: share of relevant documents", "mean score of a tenth", {"": points}))
    return found


def worst(queries: list[dict[str, Any]], main: str) -> list[str]:
    """The queries that the model ranks worst, where there is most to learn."""
    chosen = sorted(queries, key=lambda q: q["values"][main])[:WORST]
    first = [number(q["first_stage"][main]) if q["first_stage"] else "-" for q in chosen]
    rows = [(number(q["values"][main]), f, q["id"], q["query"]) for q, f in zip(chosen, first, strict=True)]
    title = '<div class="repeat"><h2>Worst queries</h2>'
    return [title, table((main, "first stage", "id", "query"), rows, "last"), "</div>"]


def page(out: dict[str, Any]) -> str:
    """One HTML file: metrics, gain of each query, score distributions, calibration, and what repeats the run."""
    rows = out["metrics"]
    parts = [head("Rerank quality") + "<h1>Rerank quality</h1>"]
    facts = [out.get("model_root") or out.get("model"), out.get("hardware"), out.get("judgements")]
    facts += [f"vLLM {out['vllm']}" if out.get("vllm") else None, out.get("date")]
    parts.append(f'<p class="dim">{html.escape(" · ".join(str(fact) for fact in facts if fact))}</p>')
    parts += ['<div class="cards">', *cards(out), "</div>", '<div class="charts">', *charts(out), "</div>"]
    shown = []
    for row in rows:
        shown.append([row["metric"], number(row["value"]), span(row["low"], row["high"]), number(row["first_stage"])])
        shown[-1] += [number(row["gain"], "+"), span(row["gain_low"], row["gain_high"], "+"), number(row["p"])]
        shown[-1].append(number(row["best_possible"]))
    parts += ["<h2>All metrics</h2>", table(NAMES, shown)]
    parts += [f"<p>{html.escape(text)}</p>" for text in [*out["findings"], *out["warnings"]]]
    parts += worst(out["queries"], rows[0]["metric"]) if rows else []
    long = ("kind", "metrics", "queries", "scored", "findings", "warnings", "calibration")
    about = [
        [key, CHOSEN.get(key, "unknown") if value is None else ", ".join(value) if isinstance(value, list) else value]
        for key, value in out.items()
        if key not in long and value != []
    ]
    about = [[key, f"{value:g}" if isinstance(value, float) else value] for key, value in about]
    parts += ['<div class="repeat"><h2>To repeat it</h2>', table(["", ""], about, "text"), "</div>"]
    return "\n".join(parts) + "</body></html>\n"


def compare_page(lines: list[str], rows: list[dict[str, Any]], gains: dict[str, list[float]], metric: str) -> str:
    """One HTML file of a comparison: quality, speed and cost of each run, the frontier, the gain of each query."""
    parts = [head("Rerank quality: comparison") + "<h1>Comparison</h1>", '<div class="cards">']
    for row in rows:
        if row["value"] is not None:
            costs = [f"{row['pairs/s']:,.0f} pairs/s" if row["pairs/s"] else None]
            if row["cost_per_million"] is not None:
                costs.append(f"{row['cost_per_million']:.3g} per million pairs")
            more = "; ".join(filter(None, costs))
            parts.append(card(number(row["value"]), f"{row['metric']}: {row['run']}", more))
    parts += ["</div>", '<div class="charts">']
    points = {row["run"]: [(row["pairs/s"], row["value"])] for row in rows if row["pairs/s"]}
    speeds = [x for part in points.values() for x, _ in part]
    if len(points) > 1:
        parts.append(chart(f"{metric} against speed", "pairs/s", points, log_x=max(speeds) > 8 * min(speeds)))
    for name, gained in gains.items():
        bars = [[i, i + 1, round(gain, 4)] for i, gain in enumerate(sorted(gained, reverse=True))]
        parts.append(chart(f"{metric}: {name}", "queries, best gain first", {}, bars))
    columns = ("run", "metric", "value", "95 % interval", "pairs/s", "speed from", "cost of a million pairs")
    shown = []
    for row in rows:
        speed, cost = (None if row[key] is None else f"{row[key]:.4g}" for key in ("pairs/s", "cost_per_million"))
        interval = span(row["low"], row["high"])
        shown.append([row["run"], row["metric"], number(row["value"]), interval, speed, row["speed_from"], cost])
    parts += ["</div>", "<h2>Quality and speed</h2>", table(columns, shown)]
    parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    return "\n".join(parts) + "</body></html>\n"
