"""Ranking metrics of each query by ir-measures, and what is sure about their means.

ir-measures computes with trec_eval's code (pytrec_eval). Libraries break ties differently
(findings/tied_scores_ndcg.sh), so it never sees a tie: it gets the ranks that a caller of rerank() gets, equal scores
in the order of the candidates.
"""

import math
from collections.abc import Sequence
from typing import Any

from rerank_kit.benchmark.quality.judgements import Judged

RESAMPLES = 9999  # of bootstrap and of the paired test
# What the extra `quality` of pyproject.toml and requirements-dev.txt pin too.
PACKAGES = ("ir-measures==0.4.3", "bm25s==0.3.16", "scipy==1.17.1")


def missing_packages() -> list[str]:
    """Those of PACKAGES that this Python lacks."""
    from importlib.util import find_spec

    return [p for p in PACKAGES if find_spec(p.partition("==")[0].replace("-", "_")) is None]


def names_of(k: int) -> list[str]:
    """The metrics, the main one first."""
    return [f"nDCG@{k}", f"MRR@{k}", "MAP", f"recall@{k}"]


def ranking(scores: Sequence[float]) -> list[int]:
    """Indices by score, best first; equal scores in input order, as rerank() gives them."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def per_query(queries: list[Judged], orders: list[list[int]], k: int, relevant: int) -> list[dict[str, float]]:
    """Metrics of each query.

    Args:
        queries: each with at least one document of grade `relevant` or more.
        orders: for each query the indices of its candidates, best first.
        relevant: lowest grade that MRR, MAP and recall count as relevant; nDCG takes the grades as gains.

    Returns:
        A {name: value} for each query. nDCG's ideal ranking and recall's whole have all judged documents, also those
        that are no candidates.
    """
    import ir_measures
    from ir_measures import AP, RR, R, nDCG

    wanted = dict(
        zip([nDCG @ k, RR(rel=relevant) @ k, AP(rel=relevant), R(rel=relevant) @ k], names_of(k), strict=True)
    )
    qrels = {str(i): q.grades for i, q in enumerate(queries)}
    # Ranks, not scores: no two are equal.
    run = {
        str(i): {q.ids[j]: float(len(order) - place) for place, j in enumerate(order)}
        for i, (q, order) in enumerate(zip(queries, orders, strict=True))
    }
    out: list[dict[str, float]] = [{} for _ in queries]
    for found in ir_measures.iter_calc(list(wanted), qrels, run):
        out[int(found.query_id)][wanted[found.measure]] = float(found.value)
    return [{name: row.get(name, 0.0) for name in wanted.values()} for row in out]


def best_order(query: Judged) -> list[int]:
    """The candidates as a perfect reranker would order them."""
    return ranking([float(g or 0) for g in query.candidate_grades])


def tied(query: Judged, scores: Sequence[float]) -> bool:
    """True if two candidates of different grades have equal scores: the model cannot say which is better."""
    seen: dict[float, int] = {}
    return any(seen.setdefault(s, g or 0) != (g or 0) for s, g in zip(scores, query.candidate_grades, strict=True))


def interval(values: Sequence[float], seed: int) -> tuple[float, float] | None:
    """95 % interval of the mean by bootstrap (BCa) over queries; None with fewer than two."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return values[0], values[0]
    data = (np.asarray(values, float),)
    found = bootstrap(data, np.mean, n_resamples=RESAMPLES, batch=500, rng=np.random.default_rng(seed))
    low, high = map(float, found.confidence_interval)
    return (low, high) if math.isfinite(low + high) else None


def p_value(gains: Sequence[float], seed: int) -> float | None:
    """Two-sided p of a paired test: signs of the gains at random. None with fewer than two queries."""
    import numpy as np
    from scipy.stats import permutation_test

    if len(gains) < 2:
        return None
    if not any(gains):
        return 1.0
    found = permutation_test(
        (np.asarray(gains, float),),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def summary(name: str, values: list[float], first: list[float] | None, best: list[float], seed: int) -> dict[str, Any]:
    """One row of the result: mean with interval, the first stage beside it, the gain over it, the perfect reranking."""
    row: dict[str, Any] = {"metric": name, "value": _mean(values)}
    row["low"], row["high"] = interval(values, seed) or (None, None)
    row |= dict.fromkeys(("first_stage", "gain", "gain_low", "gain_high", "p"))
    if first is not None:
        gains = [a - b for a, b in zip(values, first, strict=True)]
        row |= {"first_stage": _mean(first), "gain": _mean(gains), "p": p_value(gains, seed)}
        row["gain_low"], row["gain_high"] = interval(gains, seed) or (None, None)
    return row | {"best_possible": _mean(best)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
