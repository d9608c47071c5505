"""An arrangement of services, and the figures that scale.py makes from its rows and scores. Starts nothing."""

import itertools
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rerank_kit.settings import FIELDS, PASSED_ON

N_QUERIES, N_DOCS = 32, 16  # the pairs whose scores are compared
COLUMNS = ("model", "arrangement", "gpus", "tokens", "in_flight", "pairs/s", "p50_ms", "p95_ms", "refused", "err")
COLUMNS += ("efficiency", "parity", "bound")


@dataclass
class Arrangement:
    """One way to use GPUs, and what was found."""

    model: str
    text: str
    settings: dict[str, str]
    replicas: int
    gpus: int
    ports: list[int] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)
    start_s: float | None = None
    rows: list[dict] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)  # of each replica
    engines: dict[str, float] = field(default_factory=dict)  # pairs by engine while it was loaded
    beside: list[str] = field(default_factory=list)  # arrangements that were loaded at the same time
    error: str | None = None

    @property
    def name(self) -> str:
        return f"{Path(self.model).name} {self.text}"


def parse_arrangement(model: str, text: str) -> Arrangement:
    """Raises ValueError for an unknown setting."""
    settings, replicas = {}, 1
    for word in shlex.split(text):
        key, sep, value = word.partition("=")
        if key == "replicas" and value.isdigit() and int(value):
            replicas = int(value)
        elif sep and (key in FIELDS or PASSED_ON.search(key)):
            settings[key] = value
        else:
            raise ValueError(f"{word!r} in --arrange {text!r} is neither a setting of the kit nor replicas=N")
    gpus = replicas * int(settings.get("TP", 1)) * int(settings.get("DP", 1))
    return Arrangement(settings.pop("MODEL_PATH", model), text, settings, replicas, gpus)


def parity(it: Arrangement, all_of_them: list[Arrangement]) -> dict | None:
    """Differences of the scores to the model's first arrangement; None = one of the two has none."""
    first = next((one for one in all_of_them if one.model == it.model and one.scores), None)
    if not first or not it.scores:
        return None
    gaps = [abs(a - b) for scores in it.scores for a, b in zip(scores, first.scores[0], strict=True)]
    found = {"to": first.text, "max": max(gaps), "mean": sum(gaps) / len(gaps), "pairs": len(gaps)}
    # Effects that a user sees: another document ranked first, and pairs of documents that swap places.
    firsts = swaps = orders = 0
    for at in range(0, len(gaps), N_DOCS):
        a = first.scores[0][at % len(first.scores[0]) :][:N_DOCS]
        b = [score for scores in it.scores for score in scores][at : at + N_DOCS]
        firsts += a.index(max(a)) != b.index(max(b))
        for i, j in itertools.combinations(range(N_DOCS), 2):
            orders += 1
            swaps += (a[i] - a[j]) * (b[i] - b[j]) < 0
    queries = len(gaps) // N_DOCS
    return found | {"other_first": f"{firsts} of {queries} queries", "swapped": f"{swaps} of {orders} document pairs"}


def efficiency(it: Arrangement, row: dict, all_of_them: list[Arrangement]) -> float | None:
    """Throughput / (GPUs x the throughput of one GPU); None without an arrangement on one GPU of the same length."""
    base = next((one for one in all_of_them if one.model == it.model and one.gpus == 1 and one.rows), None)
    rows = [r for r in base.rows if r["tokens"] == row["tokens"]] if base else []
    # As many calls in flight per GPU as here; levels are not interpolated.
    same = [r["pairs/s"] for r in rows if r["level"] * it.gpus == row["level"]]
    best = max((r["pairs/s"] for r in rows), default=0.0)
    one = same[0] if same else best
    return row["pairs/s"] / (it.gpus * one) if one else None


def table(arrangements: list[Arrangement]) -> list[dict]:
    """Rows by COLUMNS."""
    out = []
    for it in arrangements:
        gap = parity(it, arrangements)
        head = {"model": Path(it.model).name, "arrangement": it.text, "gpus": it.gpus}
        for row in it.rows or [{}]:
            cells = {"tokens": row.get("tokens"), "in_flight": row.get("level"), "pairs/s": row.get("pairs/s")}
            cells |= {name: row.get(name) for name in ("p50_ms", "p95_ms", "refused", "err")}
            cells["efficiency"] = efficiency(it, row, arrangements) if row else None
            cells["parity"] = gap and gap["max"]
            cells["bound"] = row.get("bound") or f"failed: {it.error}"[:60]
            out.append(head | cells)
    return out


def markdown(rows: list[dict]) -> str:
    """The table as text."""

    def cell(name: str, value) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            if name in ("efficiency", "parity"):
                return f"{value:.2f}" if name == "efficiency" else f"{value:.1e}"
            return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
        return str(value).replace("|", "/").replace("\n", " ")

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(name, row[name]) for name in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"
