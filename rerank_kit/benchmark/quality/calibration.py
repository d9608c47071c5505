"""Which score means relevant: a threshold for a wanted precision or recall, and whether there is one at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rerank_kit.settings import FIELDS

FEWEST_PAIRS, FEWEST_EACH = 50, 10  # labelled pairs, and relevant and other ones among them
FEWEST_KEPT = 10  # a precision over fewer documents is chance
CLEAN, OVERLAP = 0.9, 0.7  # precision and recall that one threshold reaches both
RESAMPLES, FOLDS, BINS = 500, 5, 10
# A threshold is written as a setting if so many resamples at most have none, and if it misses by so much at most.
MAY_FAIL, MAY_MISS = 0.05, 0.1


class CalibrationError(ValueError):
    """The labels do not allow a threshold. The message has the counts."""


@dataclass
class Labelled:
    """N labelled pairs: score, whether it is relevant, number of its query."""

    scores: Any  # N numpy floats
    relevant: Any  # N numpy bools
    query: Any  # N numpy integers

    @classmethod
    def of(cls, scores: Sequence[float], relevant: Sequence[bool], query: Sequence[int]) -> "Labelled":
        import numpy as np

        return cls(np.asarray(scores, float), np.asarray(relevant, bool), np.asarray(query, int))

    def part(self, chosen: Any) -> "Labelled":
        """The pairs at these indices, or where this mask is true."""
        return Labelled(self.scores[chosen], self.relevant[chosen], self.query[chosen])

    def __len__(self) -> int:
        return len(self.scores)


def counts_at(pairs: Labelled, threshold: float) -> tuple[int, int, int]:
    """(relevant and kept, kept, relevant) of the pairs; kept: score >= threshold."""
    kept = pairs.scores >= threshold
    return int((kept & pairs.relevant).sum()), int(kept.sum()), int(pairs.relevant.sum())


def rates_at(pairs: Labelled, threshold: float) -> dict[str, float | None]:
    """Precision and recall of the pairs that score the threshold or more; None = of nothing."""
    hits, kept, relevant = counts_at(pairs, threshold)
    return {"precision": hits / kept if kept else None, "recall": hits / relevant if relevant else None}


def _cuts(pairs: Labelled) -> tuple[Any, Any, Any, Any]:
    """At each distinct score, highest first: (a threshold just below it, pairs kept, precision, recall)."""
    import numpy as np

    order = np.argsort(-pairs.scores, kind="stable")
    scores, hits = pairs.scores[order], np.cumsum(pairs.relevant[order])
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores are kept or dropped together
    kept = last + 1
    lower = np.append(scores[last[:-1] + 1], scores[-1])
    # Halfway to the next lower score: the service's own rounding (bf16) should not decide.
    return (scores[last] + lower) / 2, kept, hits[last] / kept, hits[last] / max(1, hits[-1])


def find_threshold(pairs: Labelled, kind: str, wanted: float) -> float | None:
    """The threshold that keeps most at this precision, or least at this recall; None = no threshold reaches it."""
    import numpy as np

    thresholds, kept, precision, recall = _cuts(pairs)
    if kind == "precision":
        good = np.flatnonzero((precision >= wanted) & (kept >= FEWEST_KEPT))
        return float(thresholds[good[-1]]) if len(good) else None
    good = np.flatnonzero(recall >= wanted)
    return float(thresholds[good[0]]) if len(good) else None


def check_enough(pairs: Labelled) -> None:
    """Raises CalibrationError for too few pairs."""
    n, relevant = len(pairs), int(pairs.relevant.sum())
    if n < FEWEST_PAIRS or relevant < FEWEST_EACH or n - relevant < FEWEST_EACH:
        raise CalibrationError(
            f"--calibrate has {n} labelled pairs, {relevant} of them relevant and {n - relevant} not: a threshold "
            f"needs {FEWEST_PAIRS} or more, {FEWEST_EACH} or more of each kind"
        )
    if len(set(pairs.query.tolist())) < 2:
        raise CalibrationError("--calibrate has one query: a threshold that holds for others needs several")


def calibrate(pairs: Labelled, targets: list[tuple[str, float]], seed: int) -> dict[str, Any]:
    """Thresholds for the targets with intervals, how well scores separate at all, and their reliability.

    Intervals (95 %) are by bootstrap over queries, since the pairs of a query are not independent. What a threshold
    gives on queries that it was not chosen on comes from FOLDS-fold cross-validation by query.

    Raises:
        CalibrationError: too few pairs.
    """
    check_enough(pairs)
    samples = _resampled(pairs, seed)
    found = [_target(pairs, samples, kind, wanted, seed) for kind, wanted in targets]
    thresholds, _, precision, recall = _cuts(pairs)
    both = [min(p, r) for p, r in zip(precision.tolist(), recall.tolist(), strict=True)]
    at = max(range(len(both)), key=both.__getitem__)
    out: dict[str, Any] = {"pairs": len(pairs), "relevant": int(pairs.relevant.sum())}
    out |= {"auc": auc(pairs), "auc_within_queries": auc_within(pairs)}
    out |= {"break_even": both[at], "break_even_threshold": _rounded(float(thresholds[at]))}
    out["separation"] = "clean" if both[at] >= CLEAN else "overlap" if both[at] >= OVERLAP else "none"
    return out | {"targets": found, "reliability": reliability(pairs)}


def _target(pairs: Labelled, samples: list[Labelled], kind: str, wanted: float, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"target": kind, "wanted": wanted, "threshold": None}
    _, kept, precision, _ = _cuts(pairs)
    row["best_precision"] = float(precision[kept >= FEWEST_KEPT].max())
    threshold = find_threshold(pairs, kind, wanted)
    if threshold is None:
        return row
    row["threshold"] = threshold = _rounded(threshold)
    row |= rates_at(pairs, threshold) | {"kept": counts_at(pairs, threshold)[1]}
    again = [find_threshold(sample, kind, wanted) for sample in samples]
    row["threshold_low"], row["threshold_high"] = _between([t for t in again if t is not None])
    row["not_reached"] = sum(t is None for t in again) / len(again)
    for name in ("precision", "recall"):
        rates = [rates_at(sample, threshold)[name] for sample in samples]
        row[f"{name}_low"], row[f"{name}_high"] = _between([r for r in rates if r is not None])
    return row | _held_out(pairs, kind, wanted, seed)


def _held_out(pairs: Labelled, kind: str, wanted: float, seed: int) -> dict[str, Any]:
    """Precision and recall on queries that took no part in the choice of the threshold."""
    import numpy as np

    names = np.random.default_rng(seed).permutation(np.unique(pairs.query))
    hits = kept = relevant = 0
    for fold in np.array_split(names, min(FOLDS, len(names))):
        inside = np.isin(pairs.query, fold)
        threshold = find_threshold(pairs.part(~inside), kind, wanted)
        found = counts_at(pairs.part(inside), math.inf if threshold is None else threshold)
        hits, kept, relevant = hits + found[0], kept + found[1], relevant + found[2]
    return {"held_out_precision": hits / kept if kept else None, "held_out_recall": hits / max(1, relevant)}


def auc(pairs: Labelled) -> float | None:
    """Probability that a relevant pair scores more than another one, of any query; None without both kinds."""
    from scipy.stats import rankdata

    n = int(pairs.relevant.sum())
    others = len(pairs) - n
    if not n or not others:
        return None
    return float((rankdata(pairs.scores)[pairs.relevant].sum() - n * (n + 1) / 2) / (n * others))


def auc_within(pairs: Labelled) -> float | None:
    """Mean of auc() over the queries that have both kinds: what ranking needs, where a threshold needs auc()."""
    import numpy as np

    found = [auc(pairs.part(pairs.query == name)) for name in np.unique(pairs.query)]
    known = [value for value in found if value is not None]
    return math.fsum(known) / len(known) if known else None


def reliability(pairs: Labelled) -> list[dict[str, float]]:
    """Ten groups of equal size by score: mean score, share of relevant pairs, size."""
    import numpy as np

    parts = np.array_split(np.argsort(pairs.scores, kind="stable"), min(BINS, len(pairs)))
    return [
        {"score": float(pairs.scores[p].mean()), "relevant": float(pairs.relevant[p].mean()), "pairs": len(p)}
        for p in parts
    ]


def _resampled(pairs: Labelled, seed: int) -> list[Labelled]:
    """RESAMPLES times as many queries as there are, drawn with replacement, with all pairs of each."""
    import numpy as np

    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(pairs.query == name) for name in np.unique(pairs.query)]
    draws = [rng.integers(0, len(rows), len(rows)) for _ in range(RESAMPLES)]
    return [pairs.part(np.concatenate([rows[i] for i in draw])) for draw in draws]


def _between(values: list[float]) -> tuple[float | None, float | None]:
    """The middle 95 % of the values."""
    import numpy as np

    if len(values) < 20:
        return None, None
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def dependable(row: dict[str, Any]) -> bool:
    """True if the target is reached in nearly every resample, and nearly reached on queries it was not chosen on."""
    if row["threshold"] is None or row["not_reached"] > MAY_FAIL:
        return False
    return (row[f"held_out_{row['target']}"] or 0.0) >= row["wanted"] - MAY_MISS


def lines(found: dict[str, Any], scale: str | None) -> list[str]:
    """The result in words: separation, each target, the settings."""
    out = [f"score scale: {scale or 'unknown: the checkpoint is not on this host'}"]
    text = {
        "clean": "clean separation",
        "overlap": "relevant and other documents overlap",
        "none": "no clean separation: no threshold tells relevant documents from others",
    }[found["separation"]]
    at = f"at {found['break_even_threshold']:g} precision and recall are both {found['break_even']:.2f} or more"
    out.append(f"{text} ({at}, the best that one threshold gives)")
    pooled, within = found["auc"], found["auc_within_queries"]
    out.append(f"a relevant pair scores more than another one: {pooled:.3f} of all pairs, {within:.3f} within a query")
    if within - pooled > 0.05:
        out.append("the model ranks better than its scores compare across queries: prefer top_n to a threshold")
    for row in found["targets"]:
        name = f"{row['target']} {row['wanted']:g}"
        if row["threshold"] is None:
            best = f"the best over {FEWEST_KEPT} documents or more is {row['best_precision']:.2f}"
            out.append(f"{name}: no threshold reaches it ({best}); no MIN_SCORE")
            continue
        other = "recall" if row["target"] == "precision" else "precision"
        span = "" if row["threshold_low"] is None else f" ({row['threshold_low']:.4g} to {row['threshold_high']:.4g})"
        here = f"precision {_rate(row, 'precision')}, recall {_rate(row, 'recall')}, keeps {row['kept']} pairs"
        out.append(f"{name}: threshold {row['threshold']:g}{span}: {here}")
        held, held_other = row[f"held_out_{row['target']}"], row[f"held_out_{other}"]
        said = "-" if held is None else f"{held:.2f}"
        out.append(f"{name}, on queries it was not chosen on: {row['target']} {said}, {other} {held_other or 0:.2f}")
        if dependable(row):
            out.append(f"MIN_SCORE={row['threshold']:g}")
        else:
            again = f"{row['not_reached']:.0%} of the resamples reach it with no threshold"
            out.append(f"{name}: not dependable ({again}); no MIN_SCORE")
    if any(dependable(row) for row in found["targets"]):
        if "MIN_SCORE" in FIELDS:
            out.append("write the line MIN_SCORE into .env and restart: the service then drops what scores less")
        else:
            out.append(
                "this version of the service has no setting MIN_SCORE: drop the documents in your program, "
                "[item for item in items if item.score >= MIN_SCORE]"
            )
    return out


def _rate(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")
