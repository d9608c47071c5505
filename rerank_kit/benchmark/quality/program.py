"""One quality run: judgements, scores, metrics, files."""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from rerank_kit.benchmark.load import say
from rerank_kit.benchmark.page import replace_file
from rerank_kit.benchmark.quality import metrics
from rerank_kit.benchmark.quality.arguments import parse_args
from rerank_kit.benchmark.quality.calibration import CalibrationError, Labelled, calibrate, lines, rates_at
from rerank_kit.benchmark.quality.judgements import Judged, JudgementError, Judgements, read
from rerank_kit.benchmark.quality.page import page
from rerank_kit.benchmark.quality.scoring import Scored, by_service, describe_service, offline
from rerank_kit.benchmark.server_view import without_secrets
from rerank_kit.client import RerankError
from rerank_kit.settings import ConfigError, EnvConfig


def main(argv: list[str]) -> int:
    """0 done; 1 no service or failed queries; 2 usage or judgements; 6 offline model; 130 Ctrl-C."""
    args, cfg = parse_args(argv)
    if missing := metrics.missing_packages():
        say(f"[ERR] --quality needs more packages: {sys.executable} -m pip install {' '.join(missing)}")
        return 2
    try:
        if (earlier := _earlier(args.quality)) is not None:
            return _calibrate_earlier(args, earlier)
        found = read(
            args.quality,
            run=args.run,
            corpus=args.corpus,
            queries=args.queries,
            split=args.split,
            candidates=args.candidates,
            relevant=args.relevant,
            seed=args.seed,
            sample=args.sample,
        )
        if args.unjudged == "skip":
            skip_unjudged(found)
        return _run(args, cfg, found)
    except (JudgementError, CalibrationError) as exc:
        say(f"[ERR] {exc}")
        return 2
    except OSError as exc:
        say(f"[ERR] {exc.filename}: {exc.strerror}")
        return 2
    except RerankError as exc:
        say(f"[ERR] {exc}")
        return 1
    except KeyboardInterrupt:  # before the first score; later what was scored is measured
        return 130
    except ConfigError as exc:
        say(f"[ERR] ConfigError: {exc}")
        return 6


def skip_unjudged(found: Judgements) -> None:
    """Leave out candidates without judgement."""
    for one in found.queries:
        kept = [i for i, doc_id in enumerate(one.ids) if doc_id in one.grades]
        one.ids, one.documents = [one.ids[i] for i in kept], [one.documents[i] for i in kept]
    if empty := [q for q in found.queries if not q.ids]:
        found.warnings.append(f"{len(empty)} queries have no judged candidate and are left out (--unjudged skip)")
        found.queries = [q for q in found.queries if q.ids]
    if not found.queries:
        raise JudgementError(f"{found.source}: no candidate is judged")


def _run(args: argparse.Namespace, cfg: EnvConfig, found: Judgements) -> int:
    about = describe(args, found)
    if args.offline:
        for name, value in about.items():
            _head(name, value)
        scored, more = offline(found.queries, args, cfg)
    else:
        if cfg.api_key:
            os.environ["RERANK_API_KEY"] = cfg.api_key  # where rerank() looks, and not at API_KEY
        more = describe_service(args, cfg)
        for name, value in (about | more).items():
            _head(name, value)
        earlier = begun(args, about | more)
        if earlier:
            say(f"[INFO] {args.json} holds {len(earlier['scored'])} queries of this run: going on from there")
        scored = by_service(found.queries, args, earlier)
    for text in found.warnings:
        say(f"[WARN] {text}")
    out = about | more | evaluate(args, found, scored)
    for row in table(out["metrics"]):
        print(row)
    code = 130 if scored.interrupted else 1 if out["failed_queries"] or not out["metrics"] else 0
    try:
        if args.calibrate:
            out["calibration"] = calibrate(labelled(out, args.relevant), args.calibrate, args.seed)
            out["findings"] += lines(out["calibration"], out["score_scale"])
    finally:
        for text in out["findings"]:
            print(f"# {text}")
        _write(args, out)
    return code


# What must be the same for an earlier run to be continued.
SAME = (
    "judgements_sha256", "relevant_grade", "unjudged", "instruction", "long_documents", "max_tokens_per_doc",
    "server", "model", "model_root", "server_flags",
)  # fmt: skip


def begun(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any] | None:
    """An interrupted or partly failed run of the same kind in the file of --json; None = there is none."""
    if not args.json or (earlier := _earlier(Path(args.json))) is None:
        return None
    whole = not earlier["interrupted"] and not earlier["failed_queries"]
    return None if whole or any(earlier[name] != about[name] for name in SAME) else earlier


def _head(name: str, value: object) -> None:
    none = "the service's default" if name in ("instruction", "long_documents", "max_tokens_per_doc") else "unknown"
    print(f"# {name}: {none if value is None else value}", flush=True)


def describe(args: argparse.Namespace, found: Judgements) -> dict[str, Any]:
    """What is needed to repeat the run."""
    pairs = sum(len(q.ids) for q in found.queries)
    return {
        "kind": "quality",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": without_secrets(["python", "bench_rerank.py", *args.argv]),
        "judgements": f"{found.source}: {len(found.queries)} queries, {pairs} candidates",
        "judgements_sha256": found.sha256,
        "first_stage": found.first_stage or "none: the order is shuffled by --seed",
        "relevant_grade": args.relevant,
        "unjudged": args.unjudged,
        "instruction": args.instruction,
        "long_documents": args.long_documents,
        "max_tokens_per_doc": args.max_tokens_per_doc,
        "seed": args.seed,
    }


def evaluate(args: argparse.Namespace, found: Judgements, scored: Scored) -> dict[str, Any]:
    """Metrics with intervals, values of each query, all scores with their grades."""
    every = list(zip(found.queries, scored.scores, scored.orders, strict=True))
    done = [(q, s, o) for q, s, o in every if s is not None]
    kept = [(q, s, o) for q, s, o in done if any(g >= args.relevant for g in q.grades.values())]
    queries = [q for q, _, _ in kept]
    names = metrics.names_of(args.k)
    values = metrics.per_query(queries, [o for _, _, o in kept], args.k, args.relevant)
    best = metrics.per_query(queries, [metrics.best_order(q) for q in queries], args.k, args.relevant)
    first = None
    if found.first_stage:
        first = metrics.per_query(queries, [list(range(len(q.ids))) for q in queries], args.k, args.relevant)
    rows = []
    for name in names if kept else []:
        columns = [[row[name] for row in side] if side is not None else None for side in (values, first, best)]
        rows.append(metrics.summary(name, columns[0] or [], columns[1], columns[2] or [], args.seed))
    failed = len(scored.errors)
    out: dict[str, Any] = {"pairs": sum(len(s) for _, s, _ in done), "seconds": round(scored.seconds, 3)}
    out["pairs/s"] = round(scored.timed_pairs / scored.seconds, 2) if scored.timed_pairs else None
    out |= {"cut_documents": scored.cut, "windows": scored.windows, "failed_queries": failed}
    out |= {"versions": sorted(scored.versions), "interrupted": scored.interrupted, "warnings": found.warnings}
    out["tied_queries"] = sum(metrics.tied(q, scores) for q, scores, _ in kept)
    out["metrics"] = rows
    out["queries"] = [
        {"id": q.id, "query": q.query[:200], "values": value, "first_stage": first[i] if first else None}
        for i, (q, value) in enumerate(zip(queries, values, strict=True))
    ]
    out["scored"] = [{"id": q.id, "ids": q.ids, "grades": _grades(q, args), "scores": s} for q, s, _ in done]
    out["findings"] = findings(args, found, out, len(kept), len(every) - len(done))
    return out


def _grades(query: Judged, args: argparse.Namespace) -> list[int | None]:
    """Grades of the candidates; None = not judged. With --unjudged irrelevant those are 0."""
    return [0 if g is None and args.unjudged == "irrelevant" else g for g in query.candidate_grades]


def findings(args: argparse.Namespace, found: Judgements, out: dict[str, Any], n: int, missing: int) -> list[str]:
    """The result in words."""
    speed = "" if out["pairs/s"] is None else f", {out['pairs/s']:.1f} pairs/s"
    texts = [f"{out['pairs']} pairs{speed}; metrics of {n} queries"]
    if missing:
        texts.append(f"{missing} queries have no scores (failed or interrupted) and are not in the metrics")
    if out["cut_documents"]:
        texts.append(f"the model saw only a part of {out['cut_documents']} documents (too long, or max_tokens_per_doc)")
    if out["tied_queries"]:
        texts.append(f"{out['tied_queries']} queries have equal scores for documents of different grades")
    if out["metrics"] and found.first_stage:
        row = out["metrics"][0]
        texts.append(
            f"{row['metric']} against the first stage: {verdict(row['gain'], row['gain_low'], row['gain_high'])}"
        )
    if len(out["versions"]) > 1:
        texts.append(f"different models or settings answered ({', '.join(out['versions'])}): do not use this run")
    if args.threshold is not None:
        rates = rates_at(labelled(out, args.relevant), args.threshold)
        cells = ", ".join(f"{name} {'-' if rate is None else f'{rate:.3f}'}" for name, rate in rates.items())
        texts.append(f"score {args.threshold:g} or more: {cells}")
    return texts


def verdict(gain: float, low: float | None, high: float | None) -> str:
    """A difference in words."""
    if low is None or high is None:
        return f"{gain:+.4f}, no interval"
    span = f"{gain:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"{'better' if low > 0 else 'worse' if high < 0 else 'no measurable difference'}: {span}"


def labelled(out: dict[str, Any], relevant: int) -> Labelled:
    """The labelled pairs of a run (contents of --json)."""
    rows = [
        (score, grade >= relevant, i)
        for i, one in enumerate(out["scored"])
        for score, grade in zip(one["scores"], one["grades"], strict=True)
        if grade is not None
    ]
    return Labelled.of(*(zip(*rows, strict=True) if rows else ((), (), ())))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The metrics as lines of text, the head first."""
    head = ("metric", "value", "95 % interval", "first", "gain", "95 % interval", "p", "best possible")
    out = [head]
    for r in rows:
        cells = [r["metric"], f"{r['value']:.4f}", _span(r["low"], r["high"], ""), "-", "-", "-", "-"]
        if r["first_stage"] is not None:
            p = "-" if r["p"] is None else f"{r['p']:.4f}"
            cells[3:] = [f"{r['first_stage']:.4f}", f"{r['gain']:+.4f}", _span(r["gain_low"], r["gain_high"], "+"), p]
        out.append((*cells, f"{r['best_possible']:.4f}"))
    widths = [max(map(len, column)) for column in zip(*out, strict=True)]
    return [
        "  ".join(f"{c:{'<' if i == 0 else '>'}{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in out
    ]


def _span(low: float | None, high: float | None, sign: str) -> str:
    return "-" if low is None or high is None else f"{low:{sign}.4f} to {high:{sign}.4f}"


def _write(args: argparse.Namespace, out: dict[str, Any]) -> None:
    """Write the result files."""
    if args.json:
        replace_file(Path(args.json), json.dumps(out, indent=1) + "\n")
    if args.html:
        replace_file(Path(args.html), page(out))


# --- --calibrate on the scores of an earlier run ---


def _earlier(path: Path) -> dict[str, Any] | None:
    """Contents of a file that --quality wrote with --json; None for judgements."""
    if not path.is_file() or path.suffix == ".gz":
        return None
    with path.open("rb") as file:
        if b'"kind": "quality"' not in file.read(200):
            return None
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError as exc:
        raise JudgementError(f"{path} is not a whole file of --quality --json: {exc}") from None


def _calibrate_earlier(args: argparse.Namespace, out: dict[str, Any]) -> int:
    if not args.calibrate:
        raise JudgementError(f"{args.quality} is the result of an earlier run: add --calibrate, or give judgements")
    if args.json and Path(args.json).resolve() == args.quality.resolve():
        raise JudgementError("--json: another file than that of --quality")
    print(f"# scores of: {out['command']}\n# model: {out['model']}")
    out["calibration"] = calibrate(labelled(out, args.relevant), args.calibrate, args.seed)
    out["findings"] = lines(out["calibration"], out["score_scale"])
    for text in out["findings"]:
        print(f"# {text}")
    _write(args, out)
    return 0
