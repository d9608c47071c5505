"""Cranfield as judgements for `bench_rerank.py --quality`, and sentence-transformers on the same lists.

    python measurements/cranfield.py all CRANFIELD OUT.csv              makes results/quality-cranfield.csv
    python measurements/cranfield.py write CRANFIELD FOLDER             a BEIR folder
    python measurements/cranfield.py look CRANFIELD [RUN.json]          what the numbers and grades of cranqrel mean
    python measurements/cranfield.py reference RUN.json FOLDER MODEL OUT.csv    scores and evaluator of
                                                                        sentence-transformers on the lists of a run
    python measurements/cranfield.py halves RUN.json [RUN.json ...]     threshold of odd queries, tried on even ones

CRANFIELD holds cran.all.1400, cran.qry and cranqrel (Cleverdon 1967, as distributed with SMART). The kit does not have
them. `all` writes the folder, scores it with all-MiniLM-L6-v2 in float32 (`bench_rerank.py --quality --offline`) and
compares. `all` and `reference` need sentence-transformers 6.2.0 (requirements-reference.txt says how to install it);
everything needs the packages of requirements-dev.txt.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KIT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(KIT))

from measurements.results import write as write_table
from rerank_kit.models.library import FOLDER as LIBRARY

# cranqrel: 1 = a complete answer ... 4 = of minimum interest, -1 = of no interest. Here more is better.
EVALUATED = 10  # queries for its evaluator, which computes every document of every list anew
GAIN = {1: 4, 2: 3, 3: 2, 4: 1, -1: 0}


def folder() -> Path | None:
    """CRANFIELD of the environment, or ../shared/cranfield beside the checkout; None = absent."""
    named = os.environ.get("CRANFIELD")
    for place in [Path(named)] if named else [KIT.parent / "shared" / "cranfield"]:
        if (place / "cranqrel").is_file():
            return place
    return None


def records(path: Path) -> list[tuple[str, dict[str, str]]]:
    """(number after .I, {field letter: text}) of each record of a SMART file."""
    out = []
    for part in re.split(r"^\.I ", path.read_text("latin-1"), flags=re.M)[1:]:
        number, _, rest = part.partition("\n")
        pieces = re.split(r"^\.([A-Z])\s*\n", rest, flags=re.M)
        out.append((number.strip(), {k: " ".join(v.split()) for k, v in zip(pieces[1::2], pieces[2::2], strict=True)}))
    return out


def documents(source: Path) -> dict[str, str]:
    """{number: title and abstract}. The abstract repeats the title in most records; then it is written once."""
    out = {}
    for number, fields in records(source / "cran.all.1400"):
        title, text = fields.get("T", ""), fields.get("W", "")
        out[number] = text if text.startswith(title) else f"{title} {text}".strip()
    return out


def queries(source: Path) -> dict[str, tuple[str, str]]:
    """{place in the file, from 1: (number after .I, text)}. cranqrel numbers the queries by place."""
    return {str(i): (number, fields["W"]) for i, (number, fields) in enumerate(records(source / "cran.qry"), 1)}


def judgements(source: Path) -> list[tuple[str, str, int]]:
    """(query, document, code) as in cranqrel."""
    rows = [line.split() for line in (source / "cranqrel").read_text().splitlines() if line.strip()]
    return [(query, document, int(code)) for query, document, code in rows]


def grades(source: Path) -> dict[str, dict[str, int]]:
    """{query: {document: grade}}; of a pair that is judged twice the better grade counts."""
    out: dict[str, dict[str, int]] = {}
    for query, document, code in judgements(source):
        known = out.setdefault(query, {})
        known[document] = max(known.get(document, 0), GAIN[code])
    return out


def write(source: Path, target: Path) -> None:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv."""
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("corpus", documents(source).items()),
        ("queries", ((q, text) for q, (_, text) in queries(source).items())),
    ):
        text = "".join(json.dumps({"_id": key, "text": value}) + "\n" for key, value in rows)
        (target / f"{name}.jsonl").write_text(text, "utf-8")
    lines = [f"{q}\t{d}\t{g}" for q, judged in grades(source).items() for d, g in judged.items()]
    (target / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n", "utf-8")


def look(source: Path, run: Path | None = None) -> None:
    """Show that cranqrel numbers by place, which codes BM25 finds first, and what -1 does to a run's metrics."""
    from rerank_kit.benchmark.quality.judgements import Judged, bm25
    from rerank_kit.benchmark.quality.metrics import per_query

    asked, judged, corpus = queries(source), grades(source), documents(source)
    first = bm25(corpus, {q: text for q, (_, text) in asked.items()}, 100)
    for name, number in (("by place", lambda q: q), ("by .I number", lambda q: str(int(asked[q][0])))):
        rows = [Judged(q, asked[q][1], first[q], [], judged[number(q)]) for q in asked if number(q) in judged]
        values = per_query(rows, [list(range(len(r.ids))) for r in rows], 10, 1)
        mean = math.fsum(v["nDCG@10"] for v in values) / len(values)
        print(f"queries numbered {name}: {len(rows)} have judgements, nDCG@10 of BM25 {mean:.4f}")
    ranks: dict[int, list[int]] = {}
    for query, document, code in judgements(source):
        found = first[query]
        ranks.setdefault(code, []).append(found.index(document) + 1 if document in found else 1000)
    for code, places in sorted(ranks.items()):
        top = sum(place <= 10 for place in places) / len(places)
        print(f"code {code}: {len(places)} judgements, {top:.0%} of them in the top 10 of BM25")
    if run:
        readings(source, json.loads(run.read_text("utf-8")))


def readings(source: Path, out: dict) -> None:
    """nDCG@10 of BM25 and of a run with -1 as not relevant, left out of the lists, and as good as a complete answer."""
    from rerank_kit.benchmark.quality.judgements import Judged
    from rerank_kit.benchmark.quality.metrics import per_query, ranking

    unclear = {(query, document) for query, document, code in judgements(source) if code == -1}
    known = grades(source)
    for name, grade in (("not relevant", 0), ("left out", None), ("a complete answer", 4)):
        sides: tuple[list, list, list] = ([], [], [])
        for one in out["scored"]:
            own = dict(known[one["id"]])
            for document in [d for d in own if (one["id"], d) in unclear]:
                own.pop(document)
                own |= {} if grade is None else {document: grade}
            kept = [i for i, d in enumerate(one["ids"]) if grade is not None or (one["id"], d) not in unclear]
            if any(own.values()):
                sides[0].append(Judged(one["id"], "", [one["ids"][i] for i in kept], [], own))
                sides[1].append(list(range(len(kept))))
                sides[2].append(ranking([one["scores"][i] for i in kept]))
        means = [
            math.fsum(v["nDCG@10"] for v in per_query(sides[0], orders, 10, 1)) / len(sides[0]) for orders in sides[1:]
        ]
        print(f"-1 is {name}: nDCG@10 of BM25 {means[0]:.4f}, of the run {means[1]:.4f}")


def reference(run: Path, target: Path, model: str, table: Path) -> None:
    """Compare a run of --quality with sentence-transformers: scores, nDCG of the same lists, its own evaluator."""
    sys.path.append(str(LIBRARY))  # where requirements-reference.txt puts it
    import sentence_transformers
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import cos_sim

    from rerank_kit.benchmark.quality.judgements import Judged
    from rerank_kit.benchmark.quality.metrics import per_query, ranking

    out = json.loads(run.read_text("utf-8"))
    rows = {name: [json.loads(line) for line in (target / f"{name}.jsonl").open()] for name in ("corpus", "queries")}
    needed = {doc_id for one in out["scored"] for doc_id in one["ids"]}
    rows["corpus"] = [row for row in rows["corpus"] if row["_id"] in needed]
    texts, asked = ({row["_id"]: row["text"] for row in rows[name]} for name in ("corpus", "queries"))
    network = SentenceTransformer(model, device="cpu")
    vectors = dict(zip(texts, network.encode(list(texts.values()), batch_size=64, convert_to_tensor=True), strict=True))
    of_query = dict(zip(asked, network.encode(list(asked.values()), convert_to_tensor=True), strict=True))
    judged: dict[str, dict[str, int]] = {}
    for line in (target / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        judged.setdefault(query, {})[document] = int(grade)
    listed, ours, theirs, apart = [], [], [], 0.0
    for one in out["scored"]:
        scores = cos_sim(of_query[one["id"]], torch.stack([vectors[d] for d in one["ids"]]))[0].tolist()
        apart = max(apart, *(abs(a - b) for a, b in zip(scores, one["scores"], strict=True)))
        listed.append(
            Judged(one["id"], asked[one["id"]], one["ids"], [texts[d] for d in one["ids"]], judged[one["id"]])
        )
        ours.append(ranking(one["scores"]))
        theirs.append(ranking(scores))
    found = []
    for row in out["metrics"]:
        spans = {key: row[key] for key in ("value", "low", "high", "p")}
        found.append({"way": "bm25", "metric": row["metric"], "queries": len(listed), "value": row["first_stage"]})
        found.append({"way": "kit", "metric": row["metric"], "queries": len(listed), **spans})
        found[-1] |= {"gain": row["gain"], "gain_low": row["gain_low"], "gain_high": row["gain_high"]}
        values = per_query(listed, theirs, 10, out["relevant_grade"])
        mean = math.fsum(v[row["metric"]] for v in values) / len(listed)
        found.append({"way": "sentence-transformers", "metric": row["metric"], "queries": len(listed), "value": mean})
        found.append({"way": "perfect", "metric": row["metric"], "queries": len(listed), "value": row["best_possible"]})
    found += evaluator(network, listed[:EVALUATED], ours[:EVALUATED])
    head = {key: out[key] for key in ("date", "command", "vllm", "hardware", "pairs", "seed")}
    head["command"] = re.sub(r"(?<= )/\S*/", "", head["command"])
    head["hardware"] += "; no speed is taken from this run"
    head |= {"dtype": "float32", "sentence-transformers": sentence_transformers.__version__}
    head["largest difference of a score"] = apart
    write_table(table, head, found)
    print(table.read_text("utf-8"))


def whole(source: Path, table: Path) -> None:
    """Every figure of results/quality-cranfield.csv, from the collection's files alone."""
    from rerank_kit.models.download import minilm

    model = minilm()
    with tempfile.TemporaryDirectory() as scratch:
        target, run = Path(scratch) / "cranfield", Path(scratch) / "run.json"
        write(source, target)
        command = [sys.executable, str(KIT / "bench_rerank.py"), "--quality", str(target), "--offline"]
        settings = {"MODEL_PATH": str(model), "DTYPE": "float32", "KIT_ENV_FILE": os.devnull}
        subprocess.run([*command, "--json", str(run)], env=os.environ | settings, check=True)
        reference(run, target, str(model), table)


def evaluator(network, listed, ours) -> list[dict]:
    """sentence-transformers' RerankingEvaluator (scikit-learn's nDCG, binary grades of the list) on the same lists."""
    from sentence_transformers.sentence_transformer.evaluation import RerankingEvaluator

    from rerank_kit.benchmark.quality.judgements import Judged
    from rerank_kit.benchmark.quality.metrics import per_query

    samples, binary, orders = [], [], []
    for query, order in zip(listed, ours, strict=True):
        sides: tuple[list[str], list[str]] = ([], [])
        for text, grade in zip(query.documents, query.candidate_grades, strict=True):
            sides[(grade or 0) < 1].append(text)
        if all(sides):  # it leaves out the others
            samples.append({"query": query.query, "positive": sides[0], "negative": sides[1]})
            grades = {d: int((g or 0) >= 1) for d, g in zip(query.ids, query.candidate_grades, strict=True)}
            binary.append(Judged(query.id, query.query, query.ids, query.documents, grades))
            orders.append(order)
    found = RerankingEvaluator(samples, at_k=10)(network)
    values = per_query(binary, orders, 10, 1)
    rows = []
    for name, key in (("nDCG@10", "ndcg@10"), ("MRR@10", "mrr@10"), ("MAP", "map")):
        mean = math.fsum(v[name] for v in values) / len(values)
        same = {"metric": f"binary {name}", "queries": len(values)}
        rows += [{"way": "kit", **same, "value": mean}, {"way": "RerankingEvaluator", **same, "value": found[key]}]
    return rows


def halves(names: list[str]) -> None:
    """Find the threshold for precision and recall on the odd queries and use it on the even ones."""
    from rerank_kit.benchmark.quality.calibration import calibrate, rates_at
    from rerank_kit.benchmark.quality.program import labelled

    for name in names:
        out = json.loads(Path(name).read_text("utf-8"))
        sides = [{**out, "scored": [one for one in out["scored"] if int(one["id"]) % 2 == odd]} for odd in (1, 0)]
        chosen, tried = (labelled(side, out["relevant_grade"]) for side in sides)
        for row in calibrate(chosen, [("precision", 0.5), ("recall", 0.8)], 0)["targets"]:
            rates = rates_at(tried, row["threshold"]) if row["threshold"] is not None else None
            print(f"{name}: {row['target']} {row['wanted']}: threshold {row['threshold']}, on the even queries {rates}")


def main(argv: list[str]) -> int:
    action, *rest = argv or [""]
    if action == "all" and len(rest) == 2:
        whole(Path(rest[0]), Path(rest[1]))
    elif action == "write" and len(rest) == 2:
        write(Path(rest[0]), Path(rest[1]))
    elif action == "look" and len(rest) in (1, 2):
        look(*map(Path, rest))
    elif action == "reference" and len(rest) == 4:
        reference(Path(rest[0]), Path(rest[1]), rest[2], Path(rest[3]))
    elif action == "halves" and rest:
        halves(rest)
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
