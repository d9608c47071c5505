"""Two stages on judgements: a small model scores all candidates, a large one ranks the best of them.

    python measurements/two_stages.py cost FOLDER SMALL_URL LARGE_URL COST.json [QUERIES]
    python measurements/two_stages.py quality FOLDER SMALL.json LARGE.json OUT.csv [COST.json]

FOLDER has the judgements (BEIR). `cost` sends the same queries to two running services in turns: to each alone, and
to both by `rerank(..., first=(SMALL_URL, keep))`. `quality` computes what each way ranks from the scores of two runs of
`bench_rerank.py --quality FOLDER --json`, over the queries that both have; it is what `first=` returns, because a score
does not depend on the other documents of a call. Behind what the large model ranked comes the order of the first stage.
Both need the packages of requirements-dev.txt.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KIT))

from measurements.results import write
from rerank_kit.benchmark.quality.judgements import Judged, read
from rerank_kit.benchmark.quality.metrics import interval, p_value, per_query, ranking
from rerank_kit.benchmark.server_view import hardware, without_secrets
from rerank_kit.client import rerank

KEEP = (10, 20, 50)  # documents that the first stage keeps
TIMED = (10, 20)
METRICS = ("nDCG@10", "MRR@10", "MAP")
N_TIMED = 8


def staged(first: list[int], scores: list[float], keep: int) -> list[int]:
    """The first stage's best `keep` by score, then the others in the first stage's order."""
    kept = first[:keep]
    return sorted(kept, key=lambda i: (-scores[i], i)) + first[keep:]


def ways(n_documents: int, small: list[float], large: list[float]) -> dict[tuple[str, int | None], list[int]]:
    """{(way, documents kept): order of the candidates}."""
    bm25 = list(range(n_documents))
    out: dict[tuple[str, int | None], list[int]] = {("bm25", None): bm25, ("small", None): ranking(small)}
    out["large", None] = ranking(large)
    for keep in KEEP:
        out["bm25, large", keep] = staged(bm25, large, keep)
        out["small, large", keep] = staged(ranking(small), large, keep)
    return out


def quality(queries: list[Judged], small: dict, large: dict) -> list[dict]:
    """Each way's metrics with their intervals, and the difference to the large model alone, query by query."""
    known = [{one["id"]: one for one in run["scored"]} for run in (small, large)]
    chosen = [q for q in queries if all(q.id in side for side in known)]
    for q in chosen:
        if any(side[q.id]["ids"] != q.ids for side in known):
            raise SystemExit(f"query {q.id}: the runs have other candidates than {len(q.ids)} of the folder")
    if not chosen:
        raise SystemExit("the two runs have no query in common")
    orders = [ways(len(q.ids), *(side[q.id]["scores"] for side in known)) for q in chosen]
    values = {way: per_query(chosen, [order[way] for order in orders], 10, 1) for way in orders[0]}
    n = statistics.mean(len(q.ids) for q in chosen)
    rows = []
    for (way, keep), found in values.items():
        for metric in METRICS:
            own = [row[metric] for row in found]
            low, high = interval(own, 0) or (None, None)
            row = {"way": way, "keep": keep, "metric": metric, "queries": len(chosen), "value": _mean(own)}
            row |= {"low": low, "high": high}
            row["small_pairs"] = n if "small" in way else 0
            row["large_pairs"] = n if way == "large" else keep or 0
            if way != "large":
                gains = [a - b[metric] for a, b in zip(own, values["large", None], strict=True)]
                edges = interval(gains, 0) or (None, None)
                row |= {"to_large": _mean(gains), "to_large_low": edges[0], "to_large_high": edges[1]}
                row["p"] = p_value(gains, 0)
            rows.append(row)
    return rows


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def cost(queries: list[Judged], small: str, large: str) -> dict:
    """Milliseconds of each way for the same queries, in turns, and whether two stages rank as their parts do."""
    calls: dict[str, Callable] = {
        "small": lambda q: rerank(q.query, q.documents, base_url=small),
        "large": lambda q: rerank(q.query, q.documents, base_url=large),
    }
    for keep in TIMED:
        calls[f"small, large {keep}"] = lambda q, keep=keep: rerank(
            q.query, q.documents, base_url=large, first=(small, keep)
        )
    names = list(calls)
    took: dict[str, list[float]] = {name: [] for name in names}
    same = dict.fromkeys(TIMED, 0)
    for call in calls.values():  # the first call of a service compiles
        call(queries[0])
    for turn, q in enumerate(queries):
        found = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            found[name] = calls[name](q)
            took[name].append(1000 * (time.perf_counter() - began))
            print(f"query {q.id}: {name}: {took[name][-1]:.0f} ms", file=sys.stderr)
        for keep in TIMED:
            alone = [[float(score) for score in found[way][1]] for way in ("small", "large")]
            whole = staged(ranking(alone[0]), alone[1], keep)[:3]
            same[keep] += whole == [item.index for item in found[f"small, large {keep}"][0]][:3]
    return {
        "queries": len(queries),
        "documents": statistics.mean(len(q.documents) for q in queries),
        "ms": took,
        "same_first_three": {str(keep): n for keep, n in same.items()},
        "hardware": hardware(),
    }


def cost_rows(found: dict) -> list[dict]:
    rows = []
    for name, values in found["ms"].items():
        way, keep = (name.rpartition(" ")[0], int(name.split()[-1])) if name[-1].isdigit() else (name, None)
        row = {"way": way, "keep": keep, "metric": "ms a query", "queries": found["queries"]}
        ratios = [a / b for a, b in zip(values, found["ms"]["large"], strict=True)]
        row |= {"value": statistics.median(values), "low": min(values), "high": max(values)}
        rows.append(row | {"of_large": statistics.median(ratios)})
        if keep:
            rows[-1]["same_first_three"] = found["same_first_three"][str(keep)]
    return rows


def main(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action == "cost" and len(rest) in (4, 5):
        n = int(rest[4]) if len(rest) == 5 else N_TIMED
        found = cost(read(Path(rest[0])).queries[:n], rest[1], rest[2])
        Path(rest[3]).write_text(json.dumps(found, indent=1), "utf-8")
        print(json.dumps(cost_rows(found), indent=1))
    elif action == "quality" and len(rest) in (4, 5):
        small, large = (json.loads(Path(name).read_text("utf-8")) for name in rest[1:3])
        rows = quality(read(Path(rest[0])).queries, small, large)
        head = {"date": large["date"], "command": without_secrets(["python", "measurements/two_stages.py", *argv])}
        head |= {"vllm": large.get("vllm") or small.get("vllm"), "hardware": large["hardware"]}
        head |= {"small": Path(small["model_root"]).name, "large": Path(large["model_root"]).name}
        head |= {"small pairs/s": small["pairs/s"], "large pairs/s": large["pairs/s"]}
        if len(rest) == 5:
            rows += cost_rows(json.loads(Path(rest[4]).read_text("utf-8")))
        write(Path(rest[3]), head, rows)
        print(Path(rest[3]).read_text("utf-8"))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
