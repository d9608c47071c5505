"""Thresholds: which score means relevant, on scores whose answer is known."""

import json
import random

import known_server
import pytest
from known_server import serving
from test_quality import SCORES, by_table, lines, of, quality, wings

import bench_rerank
from rerank_kit.benchmark.quality import calibration
from rerank_kit.benchmark.quality.calibration import CalibrationError, Labelled, calibrate

own_settings = known_server.own_settings  # a fixture


def labelled(n_queries=40, shift=0.0, apart=0.5, seed=1):
    """10 pairs a query, 3 of them relevant; relevant scores lie `apart` higher, queries differ by `shift`."""
    rng = random.Random(seed)
    rows = [
        (rng.gauss(0.3 + apart * (i < 3), 0.1) + level, i < 3, q)
        for q in range(n_queries)
        for level in [rng.gauss(0, shift)]
        for i in range(10)
    ]
    return Labelled.of(*zip(*rows, strict=True))


def test_threshold_reaches_its_target_and_keeps_most():
    pairs = Labelled.of([0.9] * 10 + [0.7] * 10 + [0.5] * 10, [True] * 10 + [True, False] * 5 + [False] * 10, range(30))
    assert calibration.find_threshold(pairs, "precision", 0.9) == pytest.approx(0.8)  # halfway to the next lower score
    assert calibration.find_threshold(pairs, "precision", 0.75) == pytest.approx(0.6)
    assert calibration.find_threshold(pairs, "recall", 0.6) == pytest.approx(0.8)
    assert calibration.find_threshold(pairs, "recall", 1.0) == pytest.approx(0.6)
    assert calibration.rates_at(pairs, 0.6) == {"precision": 0.75, "recall": 1.0}
    other = Labelled.of([0.9] * 9 + [0.1] * 41, [True] * 9 + [False] * 41, range(50))
    more = Labelled.of([0.9] * 10 + [0.1] * 41, [True] * 10 + [False] * 41, range(51))
    assert calibration.find_threshold(more, "precision", 1.0) == pytest.approx(0.5)
    assert calibration.find_threshold(other, "precision", 1.0) is None  # nine documents are chance


def test_clean_scores_are_clean_and_their_target_holds_on_new_queries():
    found = calibrate(labelled(), [("precision", 0.9), ("recall", 0.9)], 0)
    assert found["separation"] == "clean" and found["auc"] > 0.99
    precision, recall = found["targets"]
    fresh = labelled(seed=9)
    assert calibration.rates_at(fresh, precision["threshold"])["precision"] > 0.85
    assert calibration.rates_at(fresh, recall["threshold"])["recall"] > 0.85
    assert precision["threshold_low"] < precision["threshold"] < precision["threshold_high"]
    assert abs(precision["held_out_precision"] - 0.9) < 0.06
    shares = [row["relevant"] for row in found["reliability"]]
    assert shares[0] < 0.05 and shares[-1] > 0.95 and len(shares) == 10
    said = " | ".join(calibration.lines(found, "cosine"))
    assert (
        "score scale: cosine" in said and "clean separation" in said and f"MIN_SCORE={precision['threshold']:g}" in said
    )


def test_scores_that_do_not_separate_are_called_so():
    found = calibrate(labelled(apart=0.02), [("precision", 0.9)], 0)
    assert found["separation"] == "none" and found["targets"][0]["threshold"] is None
    said = " | ".join(calibration.lines(found, None))
    assert "no clean separation" in said and "precision 0.9: no threshold reaches it" in said
    assert "MIN_SCORE=" not in said and "unknown" in said


def test_scores_that_rank_but_do_not_compare_across_queries_are_called_so():
    found = calibrate(labelled(shift=1.0), [("recall", 0.9)], 0)
    assert found["auc_within_queries"] > 0.99 > 0.8 > found["auc"]
    assert any("prefer top_n to a threshold" in text for text in calibration.lines(found, None))


def test_a_threshold_by_chance_is_not_written_as_a_setting():
    """Twelve relevant pairs of one query happen to score best; other queries have no such scores."""
    pairs = labelled(apart=0.02)
    scores, relevant, query = pairs.scores.tolist(), pairs.relevant.tolist(), pairs.query.tolist()
    pairs = Labelled.of(scores + [2.0 + i for i in range(12)], relevant + [True] * 12, query + [0] * 12)
    found = calibrate(pairs, [("precision", 0.9)], 0)
    (row,) = found["targets"]
    assert row["threshold"] is not None and row["not_reached"] > 0.2
    assert row["held_out_recall"] == 0.0  # no other query has such scores
    assert not calibration.dependable(row | {"held_out_precision": 1.0})
    assert not calibration.dependable(row | {"not_reached": 0.0, "held_out_precision": 0.7})
    assert calibration.dependable(row | {"not_reached": 0.0, "held_out_precision": 0.85})
    said = " | ".join(calibration.lines(found, None))
    assert "precision 0.9: not dependable" in said and "MIN_SCORE=" not in said


def test_min_score_is_named_as_a_setting_only_where_it_is_one(monkeypatch):
    found = calibrate(labelled(), [("precision", 0.9)], 0)
    monkeypatch.setattr(calibration, "FIELDS", {})
    assert any("drop the documents in your program" in text for text in calibration.lines(found, None))
    monkeypatch.setattr(calibration, "FIELDS", {"MIN_SCORE": 1})
    assert any("into .env and restart" in text for text in calibration.lines(found, None))


@pytest.mark.parametrize(
    ("n", "relevant", "queries", "said"),
    [
        (5, 2, 5, "5 labelled pairs, 2 of them relevant and 3 not"),
        (100, 4, 50, "100 labelled pairs, 4 of them relevant and 96 not"),
        (100, 95, 50, "95 of them relevant and 5 not"),
        (100, 50, 1, "one query"),
    ],
)
def test_too_few_labels_are_refused_with_counts(n, relevant, queries, said):
    pairs = Labelled.of([i / n for i in range(n)], [i < relevant for i in range(n)], [i % queries for i in range(n)])
    with pytest.raises(CalibrationError, match=said):
        calibrate(pairs, [("precision", 0.9)], 0)


def test_calibrate_program_on_judgements_and_on_an_earlier_run(tmp_path, capsys):
    path, out = lines(tmp_path / "judged.jsonl", *wings()), tmp_path / "out.json"
    with serving(by_table(of(SCORES))) as service:
        assert quality(service, path, "--json", out, "--calibrate", "precision=0.9,recall=0.5") == 0
        n_calls = len(service.bodies)
        first = capsys.readouterr().out
        assert "MIN_SCORE=0.35" in first and "MIN_SCORE=0.7" in first
        page = tmp_path / "page.html"
        assert bench_rerank.main(["--quality", str(out), "--calibrate", "precision=0.9", "--html", str(page)]) == 0
        assert "MIN_SCORE=0.35" in capsys.readouterr().out and "reliability" in page.read_text()
        assert bench_rerank.main(["--quality", str(out)]) == 2
        assert "add --calibrate" in capsys.readouterr().err
        assert len(service.bodies) == n_calls
        few = lines(tmp_path / "few.jsonl", *wings(2))
        assert quality(service, few, "--calibrate", "--json", tmp_path / "few.json") == 2
        assert "8 labelled pairs" in capsys.readouterr().err
        assert json.loads((tmp_path / "few.json").read_text())["metrics"]  # the metrics are kept
