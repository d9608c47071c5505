"""Charts of the HTML pages: SVG without scripts, in the colours of the reader's light or dark mode."""

import html
import itertools
import math
import statistics
from collections.abc import Sequence

WIDE, HIGH, LEFT, BOTTOM = 440, 250, 58, 50  # of a chart, in its own units; the margins of its axes
N_COLORS = 6

COLORS = """:root{color-scheme:light dark;--text:#1c2430;--dim:#5d6878;--back:#fff;--card:#f4f6f9;--line:#dde2ea;
--c0:#1f6fb4;--c1:#d9650f;--c2:#2a8f3c;--c3:#a03ca0;--c4:#b02a2a;--c5:#5a5a5a;
--good:#d7efdc;--fair:#fdeccb;--bad:#f9d6d3}
@media(prefers-color-scheme:dark){:root{--text:#e4e8ee;--dim:#9aa5b4;--back:#14181f;--card:#1e242d;--line:#343d4a;
--c0:#63b0ee;--c1:#f59a4a;--c2:#6ccb7d;--c3:#d48ad4;--c4:#ef7f7a;--c5:#b5b5b5;
--good:#1f4a2a;--fair:#56411a;--bad:#5b2624}}
"""
LINES = """svg text{font:11px system-ui,sans-serif;fill:var(--text)}
svg .grid{stroke:var(--line)}svg polyline{fill:none;stroke-width:2}
.k0{stroke:var(--c0)}.k1{stroke:var(--c1);stroke-dasharray:7 3}.k2{stroke:var(--c2);stroke-dasharray:2 3}
.k3{stroke:var(--c3);stroke-dasharray:9 3 2 3}.k4{stroke:var(--c4);stroke-dasharray:4 4}.k5{stroke:var(--c5)}
svg .f0{fill:var(--c0)}svg .f1{fill:var(--c1)}svg .f2{fill:var(--c2)}svg .f3{fill:var(--c3)}svg .f4{fill:var(--c4)}
svg .f5{fill:var(--c5)}
"""
STYLE = (
    COLORS
    + """*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:1.2em;max-width:72em;
color:var(--text);background:var(--back)}
h1{font-size:1.5em;margin:.2em 0}h2{font-size:1.15em;margin:1.4em 0 .4em}
.dim,.note{color:var(--dim)}.note{font-size:.87em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(13em,1fr));gap:.7em;margin:1em 0}
.card{background:var(--card);border-radius:10px;padding:.8em 1em}.card b{display:block;font-size:1.75em;line-height:1.2}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(21em,100%),1fr));gap:.7em}
svg{width:100%;height:auto;background:var(--card);border-radius:10px}
"""
    + LINES
    + """.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93em}
td,th{padding:3px 8px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child,.text td{text-align:left}
.text td{white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.text td:first-child{overflow-wrap:normal;white-space:nowrap}
.last td:last-child,.last th:last-child{text-align:left;white-space:normal;min-width:16em}
.gpu{background:var(--good)}.refuse,.none{background:var(--bad)}.cpu,.engine,.client,.other{background:var(--fair)}
details{border-bottom:1px solid var(--line);padding:.3em 0}summary{cursor:pointer}pre{margin:0;white-space:pre-wrap}
@media print{@page{size:A4 landscape;margin:8mm}body{font-size:8.5px;padding:0;max-width:none}
details,.repeat,h2.each,.words{display:none}h1{margin:0}h2{margin:.5em 0 .2em}p{margin:.2em 0}td,th{padding:1px 6px}
.charts{grid-template-columns:repeat(4,1fr)}.cards{grid-template-columns:repeat(5,1fr);margin:.4em 0}
.card{padding:.4em .7em}}"""
)


def head(title: str) -> str:
    """The beginning of a page, up to its body."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from low to high."""
    raw = (high - low) / 5 or 1.0
    step = next(
        m * 10 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10) if m * 10 ** math.floor(math.log10(raw)) >= raw
    )
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    x_name: str,
    lines: dict[str, list[tuple]],
    bars: Sequence[list] = (),
    log_x: bool = False,
    *,
    from_zero: bool = False,
    in_order: bool = False,
) -> str:
    """An SVG of lines {name: [(x, y), ...]} or bars [from, to, height]; points without y are gaps.

    y starts at 0, or at the lowest value where that is less.

    Args:
        from_zero: x starts at 0 too.
        in_order: the line visits the points as they are given; else by x, through the median of equal x.
    """
    lines = {name: [(x, y) for x, y in points if y is not None] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not in_order:
        lines = {name: sorted(points) for name, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points] + [x for bar in bars for x in bar[:2]]
    if not xs:
        return ""
    ys = [0.0, *(y for points in lines.values() for _, y in points), *(bar[2] for bar in bars)]
    top, floor = max(ys) or (0.0 if min(ys) < 0 else 1.0), min(ys)
    low, high = 0 if from_zero else min(xs), max(xs)
    scale = math.log if log_x and low > 0 else float
    span = (scale(high) - scale(low)) or 1

    def at(x: float, y: float) -> str:
        across = (WIDE - LEFT - 16) * (scale(x) - scale(low)) / span
        return f"{LEFT + across:.1f},{HIGH - BOTTOM - (HIGH - BOTTOM - 30) * (y - floor) / (top - floor):.1f}"

    out = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{html.escape(title)}">']
    out.append(f'<text x="12" y="18">{html.escape(title)}</text>')
    for y in ticks(floor, top):
        x0, y0 = at(low, y).split(",")
        out.append(f'<line class="grid" x1="{x0}" x2="{WIDE - 16}" y1="{y0}" y2="{y0}"/>')
        out.append(f'<text x="{LEFT - 4}" y="{y0}" dy="4" text-anchor="end">{y:g}</text>')
    marks = sorted(set(xs)) if scale is math.log and not bars and len(set(xs)) < 12 else None
    if marks is None and scale is math.log:
        marks = [m * 10**e for e in range(-3, 8) for m in (1, 2, 5) if low <= m * 10**e <= high] or [low, high]
    for x in marks or ticks(low, high):
        out.append(f'<text x="{at(x, 0).split(",")[0]}" y="{HIGH - BOTTOM + 15}" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="{WIDE - 16}" y="{HIGH - BOTTOM + 30}" text-anchor="end">{html.escape(x_name)}</text>')
    for left, right, height in bars:
        (x, y), (x1, y1) = (map(float, at(*p).split(",")) for p in ((left, max(height, 0)), (right, min(height, 0))))
        box = f'x="{x:.1f}" y="{y:.1f}" width="{max(1.0, x1 - x - 1):.1f}" height="{y1 - y:.1f}"'
        out.append(f'<rect class="f0" {box}><title>{left:g} to {right:g}: {height:g}</title></rect>')
    for color, points in zip(itertools.cycle(range(N_COLORS)), lines.values(), strict=False):
        # Repeated runs: one point per run; the line connects their medians.
        path = points
        if not in_order:
            same = ((x, list(group)) for x, group in itertools.groupby(points, lambda p: p[0]))
            path = [(x, statistics.median(y for _, y in group)) for x, group in same]
        out.append(f'<polyline class="k{color}" points="{" ".join(at(*point) for point in path)}"/>')
        for x, y in points:
            cx, cy = at(x, y).split(",")
            out.append(f'<circle class="f{color}" cx="{cx}" cy="{cy}" r="3"><title>{x:g}: {y:g}</title></circle>')
    keys = "".join(
        f'<tspan class="f{color}" dx="12">{html.escape(name)}</tspan>'
        for color, name in zip(itertools.cycle(range(N_COLORS)), lines, strict=False)
    )
    return "".join(out) + f'<text x="0" y="{HIGH - 8}">{keys}</text></svg>'
