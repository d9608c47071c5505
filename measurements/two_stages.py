"""Two stages on judgements: a small model scores all candidates, a large one ranks the best of them.

    python measurements/two_stages.py time FOLDER SMALL.json SMALL_URL SMALL_MS.json [QUERIES]
    python measurements/two_stages.py time FOLDER SMALL.json LARGE_URL LARGE_MS.json [QUERIES]
    python measurements/two_stages.py quality FOLDER SMALL.json LARGE.json OUT.csv [SMALL_MS.json LARGE_MS.json]

FOLDER has the judgements (BEIR), SMALL.json and LARGE.json are runs of `bench_rerank.py --quality FOLDER --json`.
`quality` computes what each way ranks from their scores, over the queries that both have; it is what `rerank(...,
first=(SMALL_URL, keep))` returns, because a score does not depend on the other documents of a call. Behind what the
large model ranked comes the order of the first stage. `time` calls a running service one call at a time: with all
candidates of a query, and with those that the small model keeps.
Both need the packages of requirements-dev.txt.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KIT))

from measurements.results import write
from rerank_kit.benchmark.quality.judgements import Judged, read
from rerank_kit.benchmark.quality.metrics import interval, p_value, per_query, ranking
from rerank_kit.benchmark.server_view import without_secrets
from rerank_kit.client import rerank

KEEP = (10, 20, 50)  # documents that the first stage keeps
TIMED = (10, 20)
METRICS = ("nDCG@10", "MRR@10", "MAP")
N_TIMED = 8  # queries


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
    """Each way's metrics with their intervals, and the differences to each model alone, query by query."""
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
            for name in ("small", "large"):
                if way != name:
                    gains = [a - b[metric] for a, b in zip(own, values[name, None], strict=True)]
                    edges = interval(gains, 0) or (None, None)
                    row |= {f"to_{name}": _mean(gains), f"to_{name}_low": edges[0], f"to_{name}_high": edges[1]}
                    row[f"p_{name}"] = p_value(gains, 0)
            rows.append(row)
    return rows


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def timed(queries: list[Judged], small: dict, url: str) -> dict[str, list[float]]:
    """Milliseconds of a call of one service for each query: all candidates, and the best that the small model keeps."""
    known = {one["id"]: ranking(one["scores"]) for one in small["scored"]}
    took: dict[str, list[float]] = {"all": [], **{str(keep): [] for keep in TIMED}}
    rerank(queries[0].query, queries[0].documents, base_url=url)  # the first call compiles
    for turn, q in enumerate(queries):
        names = list(took)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            kept = range(len(q.ids)) if name == "all" else known[q.id][: int(name)]
            began = time.perf_counter()
            rerank(q.query, [q.documents[i] for i in sorted(kept)], base_url=url)
            took[name].append(1000 * (time.perf_counter() - began))
            print(f"query {q.id}: {name}: {took[name][-1]:.0f} ms", file=sys.stderr)
    return took


def cost_rows(small: dict[str, list[float]], large: dict[str, list[float]]) -> list[dict]:
    """Milliseconds a query of each way. `first=` makes the two calls one after the other, so theirs are added."""
    ways: dict[tuple[str, int | None], list[float]] = {("small", None): small["all"], ("large", None): large["all"]}
    for keep in TIMED:
        ways["small, large", keep] = [a + b for a, b in zip(small["all"], large[str(keep)], strict=True)]
    rows = []
    for (way, keep), values in ways.items():
        row = {"way": way, "keep": keep, "metric": "ms a query", "queries": len(values)}
        row |= {"value": statistics.median(values), "low": min(values), "high": max(values)}
        rows.append(row | {"of_large": statistics.median(values) / statistics.median(large["all"])})
    return rows


def main(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action == "time" and len(rest) in (4, 5):
        n = int(rest[4]) if len(rest) == 5 else N_TIMED
        small = json.loads(Path(rest[1]).read_text("utf-8"))
        found = timed(read(Path(rest[0])).queries[:n], small, rest[2])
        Path(rest[3]).write_text(json.dumps(found, indent=1), "utf-8")
    elif action == "quality" and len(rest) in (4, 6):
        small, large = (json.loads(Path(name).read_text("utf-8")) for name in rest[1:3])
        rows = quality(read(Path(rest[0])).queries, small, large)
        head = {"date": large["date"], "command": without_secrets(["python", "measurements/two_stages.py", *argv])}
        head |= {"vllm": large.get("vllm") or small.get("vllm"), "hardware": large["hardware"]}
        head |= {"small": Path(small["model_root"]).name, "large": Path(large["model_root"]).name}
        head |= {"small command": small["command"], "large command": large["command"]}
        if len(rest) == 6:
            rows += cost_rows(*(json.loads(Path(name).read_text("utf-8")) for name in rest[4:]))
        write(Path(rest[3]), head, rows)
        print(Path(rest[3]).read_text("utf-8"))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
