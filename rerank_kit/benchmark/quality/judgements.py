"""Judgements: queries, their candidate documents and relevance grades, from JSON lines, a BEIR folder or TREC."""

import gzip
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FEW_QUERIES = 20  # below it an interval says little
MOST_GRADE = 100  # more is no grade but a score or a number of clicks
BM25, SHUFFLED = "BM25 (bm25s)", "none: shuffled by --seed"


class JudgementError(ValueError):
    """Judgements that cannot be used. The message names file, line and what is allowed."""


@dataclass
class Judged:
    """One query with its candidates in first-stage order."""

    id: str
    query: str
    ids: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    grades: dict[str, int] = field(default_factory=dict)  # of all judged documents, also those that are no candidates
    instruction: str | None = None

    @property
    def candidate_grades(self) -> list[int | None]:
        """Grade of each candidate; None = not judged."""
        return [self.grades.get(doc_id) for doc_id in self.ids]


@dataclass
class Judgements:
    """All queries, where their first-stage order comes from, and what is wrong with them (with counts)."""

    source: str
    queries: list[Judged]
    first_stage: str | None
    warnings: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """The same for the same queries, their own instructions, candidates and grades."""
        rows: list[tuple] = []
        for q in self.queries:
            own = () if q.instruction is None else (q.instruction,)
            rows.append((q.id, q.query, q.ids, q.documents, sorted(q.grades.items()), *own))
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def read(
    path: Path,
    *,
    run: Path | None = None,
    corpus: Path | None = None,
    queries: Path | None = None,
    split: str = "test",
    candidates: int = 100,
    relevant: int = 1,
    seed: int = 0,
    sample: int | None = None,
) -> Judgements:
    """Read judgements and give every query its candidates.

    Args:
        path: JSON lines, a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv), or TREC qrels.
        run: a TREC run, whose order is the first stage. A folder without one gets BM25 (package bm25s).
        corpus, queries: texts of TREC qrels: JSON lines with _id, text and maybe title, or tab-separated lines.
        candidates: most documents a query.
        sample: this many queries, drawn by seed; None = all.

    Raises:
        JudgementError: a file or line that cannot be used. OSError: a file that is not there.
    """
    if path.is_dir():
        found = _folder(path, run, split, candidates)
    elif _is_json(path):
        for name, value in (("--run", run), ("--corpus", corpus), ("--queries", queries)):
            if value:
                raise JudgementError(f"{name}: {path} is JSON lines, which hold their own documents")
        found = _json_lines(path, candidates, seed)
    else:
        missing = [n for n, v in (("--corpus FILE", corpus), ("--queries FILE", queries)) if v is None]
        if missing:
            raise JudgementError(f"{path} is read as TREC qrels, which have no texts: add {' and '.join(missing)}")
        assert corpus and queries
        found = _collection(str(path), _qrels(path), _texts(corpus), _texts(queries), run, candidates)
    if sample and sample < len(found.queries):
        found.queries = random.Random(seed).sample(found.queries, sample)
        found.source += f", {sample} queries drawn by seed {seed}"
    _check(found, relevant)
    return found


# --- files ---


def _open(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not empty; .gz is unpacked."""
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file
        ):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as exc:
        raise JudgementError(f"{path} is not UTF-8: {exc}") from None
    except (gzip.BadGzipFile, EOFError) as exc:
        raise JudgementError(f"{path} is not a whole gzip file: {exc}") from None


def _is_json(path: Path) -> bool:
    return next((line.lstrip().startswith("{") for _, line in _open(path)), False)


def _one_of(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as exc:
        raise JudgementError(f"{path} line {number} is not JSON: {exc}") from None
    if not isinstance(value, dict):
        raise JudgementError(f"{path} line {number} is not a JSON object")
    return value


def _grade(value: object, where: str) -> int:
    """A grade as a whole number of at most 100; a negative one means not relevant (TREC: -1, -2)."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = 0.5
    if isinstance(value, bool):
        number = int(value)
    if not math.isfinite(number) or number != int(number) or number > MOST_GRADE:
        raise JudgementError(f"{where}: relevance {value!r} is not a whole number up to {MOST_GRADE}")
    return int(number)


def _texts(path: Path) -> dict[str, str]:
    """{id: text} from JSON lines with _id (or id), text and maybe title, or from lines of id, tab, text."""
    out: dict[str, str] = {}
    for number, line in _open(path):
        if line.lstrip().startswith("{"):
            row = _object(path, number, line)
            key, text, title = row.get("_id", row.get("id")), row.get("text"), row.get("title") or ""
            if not isinstance(key, str | int) or not isinstance(text, str) or not isinstance(title, str):
                raise JudgementError(f'{path} line {number} is not {{"_id": "...", "text": "..."}}')
            text = f"{title} {text}".strip()  # as BEIR and MTEB join them
        else:
            key, tab, text = line.partition("\t")
            if not tab:
                raise JudgementError(f"{path} line {number} is neither a JSON object nor id, tab, text")
        if str(key) in out:
            raise JudgementError(f"{path} line {number}: the id {key!r} comes a second time")
        out[str(key)] = text
    if not out:
        raise JudgementError(f"{path} has no lines")
    return out


def _qrels(path: Path) -> dict[str, dict[str, int]]:
    """{query: {document: grade}} from TREC qrels (4 columns), a BEIR table (3, with a head) or MTEB's JSON lines."""
    out: dict[str, dict[str, int]] = {}
    for number, line in _open(path):
        if line.lstrip().startswith("{"):
            row = _object(path, number, line)
            words = [str(row.get("query-id")), str(row.get("corpus-id")), str(row.get("score"))]
        else:
            words = line.split("\t") if "\t" in line else line.split()
        if number == 1 and words[-1].strip().lower() in ("score", "relevance", "rel"):
            continue
        if len(words) not in (3, 4):
            raise JudgementError(f"{path} line {number}: {len(words)} columns; qrels have query, 0, document, grade")
        query, doc, grade = words[0].strip(), words[-2].strip(), _grade(words[-1].strip(), f"{path} line {number}")
        known = out.setdefault(query, {})
        if known.get(doc, grade) != grade:
            raise JudgementError(f"{path} line {number}: query {query} judges {doc} as {known[doc]} and as {grade}")
        known[doc] = grade
    if not out:
        raise JudgementError(f"{path} has no lines")
    return out


def _ranked(path: Path) -> dict[str, list[str]]:
    """{query: documents, best first} from a TREC run (query, Q0, document, rank, score, tag) or MTEB's top_ranked."""
    rows: dict[str, list[tuple[float, str]]] = {}
    for number, line in _open(path):
        if line.lstrip().startswith("{"):
            row = _object(path, number, line)
            ids = row.get("corpus-ids")
            if not isinstance(ids, list):
                raise JudgementError(f"{path} line {number} has no list of corpus-ids")
            rows[str(row.get("query-id"))] = [(float(i), str(doc)) for i, doc in enumerate(ids)]
            continue
        words = line.split()
        try:
            query, doc, score = words[0], words[2], float(words[4])
        except (IndexError, ValueError):
            raise JudgementError(f"{path} line {number}: a run has query, Q0, document, rank, score, tag") from None
        if math.isnan(score):  # it has no place in an order
            raise JudgementError(f"{path} line {number}: the score {words[4]!r} is no number")
        rows.setdefault(query, []).append((-score, doc))
    out = {}
    for query, ranked in rows.items():  # sorted() is stable: equal scores stay in the file's order
        out[query] = list(dict.fromkeys(doc for _, doc in sorted(ranked, key=lambda row: row[0])))
        if len(out[query]) < len(ranked):
            raise JudgementError(f"{path}: query {query} lists a document twice")
    return out


# --- the three forms ---


def _folder(folder: Path, run: Path | None, split: str, candidates: int) -> Judgements:
    corpus, queries = (_one_of(folder, f"{n}.jsonl", f"{n}.jsonl.gz") for n in ("corpus", "queries"))
    names = [f"{base}.{end}" for base in (f"qrels/{split}", "qrels") for end in ("tsv", "jsonl", "txt")]
    qrels = _one_of(folder, *names)
    for found, name in ((corpus, "corpus.jsonl"), (queries, "queries.jsonl"), (qrels, f"qrels/{split}.tsv")):
        if found is None:
            have = sorted(p.stem for p in (folder / "qrels").glob("*")) if (folder / "qrels").is_dir() else []
            other = f" (--split has {', '.join(have)})" if name.startswith("qrels") and have else ""
            raise JudgementError(f"{folder} has no {name}{other}: a BEIR folder holds corpus, queries and qrels")
    assert corpus and queries and qrels
    run = run or _one_of(folder, "top_ranked.jsonl", f"top_ranked/{split}.jsonl")
    return _collection(str(folder), _qrels(qrels), _texts(corpus), _texts(queries), run, candidates)


def _collection(
    source: str,
    qrels: dict[str, dict[str, int]],
    corpus: dict[str, str],
    queries: dict[str, str],
    run: Path | None,
    candidates: int,
) -> Judgements:
    warnings = []
    if lost := [q for q in qrels if q not in queries]:
        warnings.append(f"{len(lost)} judged queries have no text and are left out: {_some(lost)}")
    if unjudged := [q for q in queries if q not in qrels]:
        warnings.append(f"{len(unjudged)} queries have no judgements and are left out: {_some(unjudged)}")
    chosen = [q for q in queries if q in qrels]
    if not chosen:
        raise JudgementError(f"{source}: no query of the judgements has a text: the ids differ ({_some(lost)})")
    gone = Counter(doc for q in chosen for doc in qrels[q] if doc not in corpus)
    if gone:
        warnings.append(f"{len(gone)} judged documents are not in the corpus: {_some(gone)}")
    first = _ranked(run) if run else bm25(corpus, {q: queries[q] for q in chosen}, candidates)
    if empty := [q for q in chosen if not first.get(q)]:
        warnings.append(f"{len(empty)} queries have no candidates in {run or BM25} and are left out: {_some(empty)}")
    made = []
    for q in chosen:
        ids = first.get(q, [])[:candidates]
        if bad := [doc for doc in ids if doc not in corpus]:
            raise JudgementError(f"{run}: query {q} lists documents that are not in the corpus: {_some(bad)}")
        if ids:
            made.append(Judged(q, queries[q], ids, [corpus[doc] for doc in ids], qrels[q]))
    return Judgements(source, made, str(run) if run else BM25, warnings)


def bm25(corpus: dict[str, str], queries: dict[str, str], k: int) -> dict[str, list[str]]:
    """The k best documents of each query by BM25 (bm25s: k1 1.5, b 0.75, English stop words, no stemming)."""
    import bm25s

    names = list(corpus)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(corpus.values()), stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries.values()), stopwords="en", show_progress=False)
    # Documents that share no word with the query come last, with the score 0: they are no candidates.
    found, scores = index.retrieve(tokens, k=min(k, len(names)), show_progress=False)
    return {
        query: [names[i] for i, score in zip(docs, row, strict=True) if score > 0]
        for query, docs, row in zip(queries, found, scores, strict=True)
    }


def _json_lines(path: Path, candidates: int, seed: int) -> Judgements:
    """Lines of a query with documents and relevance, of positive and negative documents, or of one labelled pair."""
    made: dict[tuple[str, str | None], Judged] = {}
    twice, listed = 0, True
    for number, line in _open(path):
        row, where = _object(path, number, line), f"{path} line {number}"
        query, instruction = row.get("query"), row.get("instruction")
        if not isinstance(query, str) or not isinstance(instruction, str | None):
            raise JudgementError(f'{where} has no text as "query"' + " (or its instruction is no text)")
        documents, grades, ids, ordered = _documents(row, where)
        listed = listed and ordered
        one = made.setdefault((query, instruction), Judged(str(row.get("id", len(made) + 1)), query))
        one.instruction = instruction
        for i, (text, grade) in enumerate(zip(documents, grades, strict=True)):
            doc_id = ids[i] or f"d{len(one.ids)}"
            if doc_id in one.ids:
                raise JudgementError(f"{where}: the document id {doc_id!r} comes twice for this query")
            twice += text in one.documents
            one.ids.append(doc_id)
            one.documents.append(text)
            if grade is not None:
                one.grades[doc_id] = _grade(grade, where)
    queries = list(made.values())
    if doubles := [key for key, n in Counter(q.id for q in queries).items() if n > 1]:
        raise JudgementError(f"{path}: the id of a query comes twice: {_some(doubles)}")
    warnings = [f"{twice} documents come a second time for their query"] if twice else []
    first: str | None = "the order of the documents in the file"
    if not listed or all(_sorted_by_grade(q) for q in queries):
        # Equal scores keep the candidates' order, so an order by relevance would flatter every model.
        first = None
        if listed:
            warnings.append("the documents come sorted by relevance: no first stage to compare with; shuffled")
        for one in queries:
            order = random.Random(f"{seed} {one.id}").sample(range(len(one.ids)), len(one.ids))
            one.ids, one.documents = [one.ids[i] for i in order], [one.documents[i] for i in order]
    if longer := [q for q in queries if len(q.ids) > candidates]:
        warnings.append(f"{len(longer)} queries have more than --candidates {candidates} documents: cut")
        for one in longer:
            one.ids, one.documents = one.ids[:candidates], one.documents[:candidates]
    return Judgements(str(path), queries, first, warnings)


def _documents(row: dict[str, Any], where: str) -> tuple[list[str], list[Any], list[str | None], bool]:
    """(texts, grades, ids, whether their order may be a first stage) of one line."""
    if "positive" in row or "negative" in row:
        sides = [row.get(side, []) for side in ("positive", "negative")]
        sides = [[side] if isinstance(side, str) else side for side in sides]
        if not all(isinstance(side, list) and all(isinstance(t, str) for t in side) for side in sides):
            raise JudgementError(f"{where}: positive and negative are lists of texts")
        good, bad = sides
        return [*good, *bad], [1] * len(good) + [0] * len(bad), [None] * (len(good) + len(bad)), False
    if "document" in row:
        if not isinstance(row["document"], str):
            raise JudgementError(f"{where}: document is no text")
        return [row["document"]], [row.get("relevance")], [None], True
    documents = row.get("documents")
    if not isinstance(documents, list) or not documents:
        raise JudgementError(f'{where} has no list of "documents", no "document" and no "positive" and "negative"')
    rich = [d if isinstance(d, dict) else {"text": d} for d in documents]
    grades = row.get("relevance", [d.get("relevance") for d in rich])
    if not all(isinstance(d.get("text"), str) for d in rich):
        raise JudgementError(f'{where}: a document is a text or {{"text": "...", "relevance": 1}}')
    if not isinstance(grades, list) or len(grades) != len(rich):
        n = len(grades) if isinstance(grades, list) else "no list"
        raise JudgementError(f"{where}: {len(rich)} documents, relevance has {n}")
    return [d["text"] for d in rich], grades, [str(d["id"]) if "id" in d else None for d in rich], True


def _sorted_by_grade(one: Judged) -> bool:
    grades = [g or 0 for g in one.candidate_grades]
    return grades == sorted(grades, reverse=True)


# --- what may be wrong with them ---


def _check(found: Judgements, relevant: int) -> None:
    """Count what a reader has to know. Raises JudgementError where nothing can be measured."""
    queries, say = found.queries, found.warnings.append
    if not queries:
        raise JudgementError(f"{found.source}: no query with documents")
    pairs = sum(len(q.ids) for q in queries)
    if unjudged := sum(g is None for q in queries for g in q.candidate_grades):
        say(f"{unjudged} of {pairs} candidates are not judged ({unjudged / pairs:.0%})")
    if negative := sum(g < 0 for q in queries for g in q.grades.values()):
        say(f"{negative} judgements have a negative grade, which counts as 0")
        for one in queries:
            one.grades = {doc: max(0, grade) for doc, grade in one.grades.items()}
    none = [q for q in queries if not any(g >= relevant for g in q.grades.values())]
    if none:
        say(f"{len(none)} queries have no document of grade {relevant} or more and are left out of the metrics")
    if len(none) == len(queries):
        top = max((g for q in queries for g in q.grades.values()), default=None)
        raise JudgementError(f"{found.source}: no document has grade {relevant} or more (highest: {top})")
    lost = [q for q in queries if q not in none and not any((g or 0) >= relevant for g in q.candidate_grades)]
    if lost:
        say(f"{len(lost)} queries have no relevant document among their candidates: no reranker can help them")
    if (n := len(queries) - len(none)) < FEW_QUERIES:
        say(f"only {n} queries with a relevant document: {FEW_QUERIES} or more are needed to tell models apart")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
