"""The plot at the top of docs/performance.md, from results/call-h200.csv, by the charts of the kit's own report.

python measurements/plot.py [FILE.svg]      default: docs/call-h200.svg
"""

import re
import sys
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KIT)]

from measurements import results
from rerank_kit.benchmark.charts import COLORS, HIGH, LINES, WIDE, chart

FILE = KIT / "docs" / "call-h200.svg"
NAMES = {"plain": "plain vllm serve", "whole": "the kit", "exact": "the kit, EXACT=1"}


def picture() -> str:
    """One SVG with two charts side by side: p50 and pairs/s against calls in flight."""
    rows = [row for row in results.read("call-h200")[1] if row["kind"] == "load"]
    parts = []
    for place, (title, column) in enumerate((("p50, ms", "p50_ms"), ("pairs/s", "pairs/s"))):
        points = {
            shown: [(row["level"], row[column]) for row in rows if row["arrangement"] == name]
            for name, shown in NAMES.items()
        }
        inner = chart(title, "calls in flight", points, log_x=True)
        parts.append(re.sub(r"^<svg ", f'<svg x="{place * WIDE}" width="{WIDE}" height="{HIGH}" ', inner))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDE} {HIGH}" role="img">'
    back = '<rect width="100%" height="100%" style="fill:var(--card)"/>'
    return f"{head}<style>{COLORS}{LINES}</style>{back}{''.join(parts)}</svg>\n"


def main(argv: list[str]) -> int:
    (Path(argv[0]) if argv else FILE).write_text(picture(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
