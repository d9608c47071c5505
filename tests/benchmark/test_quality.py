"""bench_rerank.py --quality: judgements, metrics and thresholds against values worked out by hand."""

import asyncio
import gzip
import json
import math
import os
import random
import re
import signal
import tomllib
from pathlib import Path

import known_server
import pytest
from aiohttp import web
from conftest import run_kit
from known_server import serving
from test_page import Balance

import bench_rerank
from rerank_kit import settings
from rerank_kit.benchmark.quality import judgements, metrics, scoring
from rerank_kit.benchmark.quality.compare import compare, frontier
from rerank_kit.benchmark.quality.judgements import Judged, JudgementError, read

KIT = Path(bench_rerank.__file__).parent
own_settings = known_server.own_settings  # a fixture


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def by_table(scores, default=0.0):
    """A service that scores a document by its text."""

    async def behave(service, endpoint, body):
        rows = [
            {"index": i, "document": {"text": text}, "relevance_score": scores.get(text, default)}
            for i, text in enumerate(body["documents"])
        ]
        rows.sort(key=lambda row: -row["relevance_score"])
        return web.json_response({"id": "a", "model": body["model"], "usage": {}, "results": rows})

    return behave


def quality(service, *argv):
    return bench_rerank.main(["--quality", *map(str, argv), "--base-url", service.url])


# --- metrics ---


def test_metrics_are_those_worked_out_by_hand():
    """Grades 2, 0, 1 ranked b, a, c; a fourth document with grade 1 is no candidate."""
    query = Judged("q", "?", ["a", "b", "c"], ["", "", ""], {"a": 2, "b": 0, "c": 1, "d": 1})
    (found,) = metrics.per_query([query], [metrics.ranking([0.5, 0.9, 0.1])], 3, 1)
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["nDCG@3"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(4)) / ideal)
    assert found["MRR@3"] == pytest.approx(1 / 2)
    assert found["MAP"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert found["recall@3"] == pytest.approx(2 / 3)
    (found,) = metrics.per_query([query], [metrics.ranking([0.5, 0.9, 0.1])], 3, 2)  # only grade 2 is relevant
    assert (found["MRR@3"], found["recall@3"]) == (0.5, 1.0)
    (found,) = metrics.per_query([query], [[2, 0, 1]], 3, 2)  # c with grade 1 comes first and does not count
    assert (found["MRR@3"], found["MAP"]) == (0.5, 0.5)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_equal_scores_rank_in_input_order_whatever_the_documents_are_called(names):
    """pytrec_eval alone would rank them by name."""
    first = Judged("q", "?", list(names), ["", ""], {names[0]: 1, names[1]: 0})
    last = Judged("q", "?", list(names), ["", ""], {names[0]: 0, names[1]: 1})
    values = metrics.per_query([first, last], [metrics.ranking([0.5, 0.5])] * 2, 10, 1)
    assert [v["MRR@10"] for v in values] == [1.0, 0.5]
    assert metrics.tied(first, [0.5, 0.5]) and not metrics.tied(first, [0.5, 0.4])


def test_a_query_that_finds_nothing_counts_as_zero():
    query = Judged("q", "?", ["a"], [""], {"z": 1})
    assert metrics.per_query([query], [[0]], 10, 1) == [dict.fromkeys(metrics.names_of(10), 0.0)]


def test_interval_holds_the_true_mean_about_95_times_in_100():
    rng = random.Random(1)
    held = 0
    for seed in range(60):
        low, high = metrics.interval([rng.betavariate(2, 3) for _ in range(60)], seed)
        held += low <= 2 / 5 <= high
    assert 51 <= held <= 60
    assert metrics.interval([0.3], 0) is None and metrics.interval([0.3, 0.3], 0) == (0.3, 0.3)


def test_p_of_noise_is_even_and_of_a_shift_is_small():
    rng = random.Random(2)
    noise = [metrics.p_value([rng.gauss(0, 1) for _ in range(40)], n) for n in range(60)]
    assert sum(p < 0.05 for p in noise) <= 8 and 15 <= sum(p < 0.5 for p in noise) <= 45
    assert metrics.p_value([rng.gauss(1, 1) for _ in range(40)], 0) < 0.001
    assert metrics.p_value([0.0] * 40, 0) == 1.0


# --- judgements ---


def test_json_lines_in_their_three_forms_are_the_same(tmp_path):
    one = lines(tmp_path / "a.jsonl", {"query": "q", "documents": ["x", "y", "z"], "relevance": [0, 1, None]})
    two = lines(
        tmp_path / "b.jsonl",
        {"query": "q", "documents": [{"text": "x", "relevance": 0}, {"text": "y", "relevance": 1}, {"text": "z"}]},
    )
    three = lines(
        tmp_path / "c.jsonl",
        *({"query": "q", "document": d, "relevance": r} for d, r in zip("xyz", (0, 1, None), strict=True)),
    )
    found = [read(path) for path in (one, two, three)]
    assert [f.queries for f in found] == [found[0].queries] * 3
    assert found[0].queries[0].candidate_grades == [0, 1, None]
    assert found[0].first_stage and "1 of 3 candidates are not judged (33%)" in found[0].warnings


def test_an_order_by_relevance_is_no_first_stage(tmp_path):
    """Else a model without any signal would look perfect: equal scores keep the order of the file."""
    many = [{"query": f"q{i}", "positive": ["good"], "negative": [f"bad{j}" for j in range(9)]} for i in range(30)]
    path = lines(tmp_path / "pairs.jsonl", *many)
    found = read(path, seed=1)
    assert found.first_stage is None
    firsts = [q.documents[0] for q in found.queries]
    assert 0 < firsts.count("good") < 15
    with serving(by_table({})) as service:
        assert quality(service, path, "--json", tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["metrics"][0]["value"] < 0.7 and out["metrics"][0]["first_stage"] is None
    assert out["tied_queries"] == 30
    listed = [{"query": f"q{i}", "documents": ["a", "b"], "relevance": [1, 0]} for i in range(3)]
    found = read(lines(tmp_path / "sorted.jsonl", *listed))
    assert found.first_stage is None and any("sorted by relevance" in w for w in found.warnings)


def beir(folder):
    (folder / "qrels").mkdir(parents=True)
    lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "wing", "text": "flow over a wing"},
        {"_id": "d2", "text": "heat in slabs"},
        {"_id": "d3", "text": "wing body interference"},
    )
    lines(folder / "queries.jsonl", {"_id": "1", "text": "wing interference"}, {"_id": "2", "text": "unjudged"})
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\td3\t2\n1\td1\t-1\n1\tgone\t1\n")
    return folder


def test_a_beir_folder_gets_bm25_as_first_stage(tmp_path):
    found = read(beir(tmp_path / "beir"))
    (query,) = found.queries
    assert (query.id, query.ids) == ("1", ["d3", "d1"])  # d2 shares no word
    assert query.documents[1] == "wing flow over a wing" and query.candidate_grades == [2, 0]
    assert found.first_stage == judgements.BM25
    said = " | ".join(found.warnings)
    for text in ("1 queries have no judgements", "1 judged documents are not in the corpus: gone", "1 judgements have"):
        assert text in said


def test_trec_files_and_a_run(tmp_path):
    folder = beir(tmp_path / "beir")
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("1 0 d3 1\n1 0 d1 0\n")
    run = tmp_path / "run.trec"
    run.write_text("1 Q0 d2 1 9.5 x\n1 Q0 d1 2 3.5 x\n1 Q0 d3 3 7.5 x\n")
    tabbed = tmp_path / "queries.tsv"
    tabbed.write_text("1\twing interference\n")
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    found = read(qrels, run=run, corpus=packed, queries=tabbed)
    assert found.queries[0].ids == ["d2", "d3", "d1"]  # by score, as trec_eval reads a run, not by the rank column
    assert found.first_stage == str(run)
    assert read(qrels, run=run, corpus=packed, queries=tabbed, candidates=2).queries[0].ids == ["d2", "d3"]
    with pytest.raises(JudgementError, match="read as TREC qrels, which have no texts: add --corpus FILE and --quer"):
        read(qrels, run=run)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"query": "q", "documents": ["a"], "relevance": [0.5]}], "line 1: relevance 0.5 is not a whole number"),
        ([{"query": "q", "documents": ["a"], "relevance": [101]}], "line 1: relevance 101 is not a whole number up to"),
        *(
            (
                [{"query": "q", "documents": ["a"], "relevance": [x]}],
                f"line 1: relevance .*{said}.* is not a whole number",
            )
            for x, said in (
                (math.nan, "nan"),
                (math.inf, "inf"),
                (-math.inf, "-inf"),
                (10**400, "1000"),
                ("NaN", "NaN"),
            )
        ),
        ([{"query": "q", "documents": ["a", "b"], "relevance": [1]}], "line 1: 2 documents, relevance has 1"),
        ([{"query": "q", "documents": ["a"], "relevance": [0]}], r"no document has grade 1 or more \(highest: 0\)"),
        ([{"query": "q", "documents": []}], 'line 1 has no list of "documents"'),
        ([{"query": 1, "documents": ["a"]}], 'line 1 has no text as "query"'),
        ([{"query": "q", "documents": [{"id": "a", "text": "x"}] * 2}], "line 1: the document id 'a' comes twice"),
        ([{"query": q, "id": "1", "document": "a", "relevance": 1} for q in "pq"], "id of a query comes twice: 1"),
    ],
)
def test_bad_json_lines_name_line_and_value(tmp_path, rows, said):
    with pytest.raises(JudgementError, match=said):
        read(lines(tmp_path / "bad.jsonl", *rows))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("qrels/test.tsv", "1\td3\t1\n1\td3\t2\n", "line 2: query 1 judges d3 as 1 and as 2"),
        ("qrels/test.tsv", "1\td3\n", "line 1: 2 columns"),
        ("qrels/test.tsv", "1\td3\t1\n1\td2\tnan\n", "line 2: relevance 'nan' is not a whole number"),
        ("qrels/test.tsv", "1\td3\tinf\n", "line 1: relevance 'inf' is not a whole number"),
        ("qrels/test.tsv", "9\td3\t1\n", "no query of the judgements has a text"),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n' * 2, "line 2: the id 'd1' comes a second time"),
        ("corpus.jsonl", "broken\n", "line 1 is neither a JSON object nor id, tab, text"),
        ("top_ranked.jsonl", '{"query-id": "1", "corpus-ids": ["d1", "d1"]}\n', "query 1 lists a document twice"),
        ("top_ranked.jsonl", '{"query-id": "1", "corpus-ids": ["d7"]}\n', "lists documents that are not in the corpus"),
    ],
)
def test_bad_folders_name_file_and_line(tmp_path, file, text, said):
    folder = beir(tmp_path / "beir")
    (folder / file).write_text(text)
    with pytest.raises(JudgementError, match=said):
        read(folder)


def test_a_run_whose_score_is_no_number_names_its_line(tmp_path):
    folder, run = beir(tmp_path / "beir"), tmp_path / "run.txt"
    run.write_text("1 Q0 d1 1 0.5 x\n1 Q0 d2 2 nan x\n")
    with pytest.raises(JudgementError, match=r"run\.txt line 2: the score 'nan' is no number"):
        read(folder, run=run)


def test_sha256_tells_judgements_apart(tmp_path):
    """A query's own instruction is sent with it, so scores of another one are those of other judgements."""
    one = {"query": "q", "documents": ["a", "b"], "relevance": [0, 1]}
    changed = [{}, {"instruction": "Judge."}, {"instruction": "Rank."}, {"instruction": ""}, {"query": "p"}]
    changed += [{"documents": ["a", "c"]}, {"relevance": [0, 2]}, {"id": "x"}]
    found = [read(lines(tmp_path / "j.jsonl", one | more)).sha256 for more in changed]
    assert len(set(found)) == len(changed)
    assert read(lines(tmp_path / "j.jsonl", one | {"instruction": None})).sha256 == found[0]


def test_what_is_wrong_with_judgements_is_counted(tmp_path):
    path = lines(
        tmp_path / "some.jsonl",
        {"query": "a", "documents": ["x", "y", "y"], "relevance": [0, 1, 1]},
        {"query": "b", "documents": ["x"], "relevance": [0]},
    )
    said = " | ".join(read(path).warnings)
    for text in (
        "1 documents come a second time for their query",
        "1 queries have no document of grade 1 or more and are left out of the metrics",
        "only 1 queries with a relevant document: 20 or more are needed",
    ):
        assert text in said


# --- the program ---


def wings(n=24):
    """n queries of four documents; the best comes third."""
    return [
        {"query": f"q{i}", "documents": [f"{i} none", f"{i} some", f"{i} best", f"{i} also none"],
         "relevance": [0, 1, 2, None]}
        for i in range(n)
    ]  # fmt: skip


SCORES = {"none": 0.1, "some": 0.5, "best": 0.9, "also none": 0.2}


def of(scores, wrong=(), n=24):
    """Scores by text; for the queries in `wrong` the best document scores 0."""
    return {f"{i} {w}": 0.0 if i in wrong and w == "best" else s for i in range(n) for w, s in scores.items()}


def test_a_run_prints_and_writes_what_was_worked_out_by_hand(tmp_path, capsys):
    path = lines(tmp_path / "judged.jsonl", *wings())
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    with serving(by_table(of(SCORES, wrong=range(6)))) as service:
        assert quality(service, path, "--json", out, "--html", page, "--threshold", "0.4") == 0
        assert len(service.bodies) == 24
    found = json.loads(out.read_text())
    ndcg = found["metrics"][0]
    ideal = 2 + 1 / math.log2(3)
    wrong = (1 + 2 / math.log2(5)) / ideal  # some, also none, none, best
    first = (1 / math.log2(3) + 2 / math.log2(4)) / ideal
    assert ndcg["metric"] == "nDCG@10" and ndcg["best_possible"] == 1.0
    assert ndcg["value"] == pytest.approx((18 + 6 * wrong) / 24) and ndcg["first_stage"] == pytest.approx(first)
    assert ndcg["low"] < ndcg["value"] < ndcg["high"] and ndcg["gain_low"] > 0 and ndcg["p"] < 0.01
    assert found["queries"][0]["values"]["nDCG@10"] == pytest.approx(wrong)
    assert found["scored"][7] == {"id": "8", "ids": ["d0", "d1", "d2", "d3"], "grades": [0, 1, 2, 0],
                                  "scores": [0.1, 0.5, 0.9, 0.2]}  # fmt: skip
    shown = capsys.readouterr()
    assert f"nDCG@10    {ndcg['value']:.4f}" in shown.out and "better: +" in shown.out
    assert "24 of 96 candidates are not judged (25%)" in shown.err
    assert f"score 0.4 or more: precision 1.000, recall {42 / 48:.3f}" in shown.out
    Balance(page.read_text())
    assert page.read_text().count("<svg") == 3 and "Worst queries" in page.read_text()


def test_a_query_without_relevant_documents_is_told_and_not_in_the_means(tmp_path, capsys):
    rows = [*wings(), {"query": "none", "documents": ["x", "y"], "relevance": [0, 0]}]
    path, out = lines(tmp_path / "judged.jsonl", *rows), tmp_path / "out.json"
    with serving(by_table(of(SCORES))) as service:
        assert quality(service, path, "--json", out) == 0
    found = json.loads(out.read_text())
    assert len(found["queries"]) == 24 and found["metrics"][0]["value"] == 1.0 and len(found["scored"]) == 25
    assert "1 queries have no document of grade 1 or more and are left out" in capsys.readouterr().err


def test_the_script_has_a_word_for_it(tmp_path):
    lines(tmp_path / "judged.jsonl", *wings())
    with serving(by_table(of(SCORES))) as service:
        done = run_kit("quality", "judged.jsonl", "--k", "3", cwd=tmp_path, BASE_URL=service.url, API_KEY="kk")
        assert {headers.get("Authorization") for headers in service.headers} == {"Bearer kk"}
    assert done.returncode == 0 and re.search(r"^nDCG@3 +1\.0000 ", done.stdout, re.M), done.stdout + done.stderr
    done = run_kit("quality", "no such file.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "[ERR] no such file.jsonl: No such file" in done.stderr


def test_unjudged_documents_can_be_left_out(tmp_path):
    path = lines(tmp_path / "judged.jsonl", *wings())
    with serving(by_table(of(SCORES))) as service:
        assert quality(service, path, "--unjudged", "skip", "--json", tmp_path / "out.json") == 0
        assert {len(body["documents"]) for _, body in service.bodies} == {3}
    assert json.loads((tmp_path / "out.json").read_text())["pairs"] == 72


def test_what_a_call_is_sent_with(tmp_path):
    rows = wings(2)
    rows[1]["instruction"] = "own"
    path = lines(tmp_path / "judged.jsonl", *rows)
    with serving(by_table({})) as service:
        quality(service, path, "--instruction", "all", "--max-tokens-per-doc", "7", "--model", "other")
        sent = sorted((b["query"], b["instruction"], b["max_tokens_per_doc"], b["model"]) for _, b in service.bodies)
    assert sent == [("q0", "all", 7, "other"), ("q1", "own", 7, "other")]


def test_a_refused_query_is_sent_again(tmp_path, monkeypatch):
    """A slow service answers 429 to what would wait too long; no query may be lost by that."""
    monkeypatch.setattr(scoring, "PATIENCE_S", 0.01)
    monkeypatch.setenv("RETRIES", "0")
    settings._cache.clear()
    path = lines(tmp_path / "judged.jsonl", *wings())
    answer = by_table(of(SCORES))

    async def busy(service, endpoint, body):
        times = sum(b["query"] == body["query"] for _, b in service.bodies)
        return web.Response(status=429, text="busy") if times < 3 else await answer(service, endpoint, body)

    try:
        with serving(busy) as service:
            assert quality(service, path, "--json", tmp_path / "out.json") == 0
    finally:
        settings._cache.clear()
    assert json.loads((tmp_path / "out.json").read_text())["failed_queries"] == 0


def test_a_failed_query_is_told_and_a_second_run_asks_only_for_it(tmp_path, capsys):
    path, out = lines(tmp_path / "judged.jsonl", *wings()), tmp_path / "out.json"
    answer, faulty = by_table(of(SCORES)), [True]

    async def behave(service, endpoint, body):
        if faulty[0] and body["query"] == "q5":
            return web.Response(status=400, text="no")
        return await answer(service, endpoint, body)

    with serving(behave) as service:
        assert quality(service, path, "--json", out) == 1
        found = json.loads(out.read_text())
        assert found["failed_queries"] == 1 and len(found["queries"]) == 23
        assert "1 queries have no scores (failed or interrupted)" in capsys.readouterr().out
        faulty[0] = False
        service.bodies.clear()
        assert quality(service, path, "--json", out) == 0
        assert [body["query"] for _, body in service.bodies] == ["q5"]
        found = json.loads(out.read_text())
        assert (found["failed_queries"], found["pairs"], len(found["queries"])) == (0, 96, 24)
        service.bodies.clear()
        assert quality(service, path, "--json", out) == 0  # a whole run is measured anew
        assert len(service.bodies) == 24


def test_ctrl_c_keeps_what_was_scored_and_a_second_run_goes_on(tmp_path, capsys):
    path, out = lines(tmp_path / "judged.jsonl", *wings()), tmp_path / "out.json"
    answer, pending = by_table(of(SCORES)), [True]

    async def behave(service, endpoint, body):
        if pending and len(service.bodies) >= 9:
            pending.clear()
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.02)
        return await answer(service, endpoint, body)

    with serving(behave) as service:
        assert quality(service, path, "--json", out) == 130
        found = json.loads(out.read_text())
        n_done = len(found["queries"])
        assert found["interrupted"] and 5 <= n_done <= 13 and found["metrics"][0]["value"] == 1.0
        service.bodies.clear()
        assert quality(service, path, "--json", out) == 0
        assert len(service.bodies) == 24 - n_done
    assert f"holds {n_done} queries of this run" in capsys.readouterr().err
    found = json.loads(out.read_text())
    assert not found["interrupted"] and len(found["queries"]) == 24


def test_no_service_is_one_line(tmp_path, capsys):
    path = lines(tmp_path / "judged.jsonl", *wings(1))
    assert bench_rerank.main(["--quality", str(path), "--base-url", "http://127.0.0.1:9/v1"]) == 1
    assert re.search(r"^\[ERR\] no server at http://127.0.0.1:9/v1", capsys.readouterr().err, re.M)


def test_missing_packages_are_named_with_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "PACKAGES", (*metrics.PACKAGES, "no-such-package==1.0"))
    assert bench_rerank.main(["--quality", str(lines(tmp_path / "j.jsonl", *wings(1)))]) == 2
    assert re.search(r"--quality needs more packages: \S+ -m pip install no-such-package==1.0", capsys.readouterr().err)


def test_pins_are_the_same_everywhere():
    extra = tomllib.loads((KIT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["quality"]
    assert tuple(extra) == metrics.PACKAGES
    assert set(extra) <= set((KIT / "requirements-dev.txt").read_text().splitlines())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--quality"], "expected one argument"),
        (["--quality", "x", "--calibrate", "precision=1.5"], "'precision=1.5' is not a target"),
        (["--quality", "x", "--calibrate", "recall=0"], "'recall=0' is not a target"),
        (["--quality", "x", "--offline", "--model", "m"], "--offline: not with --base-url or --model"),
        (["--quality", "x", "--max-tokens-per-doc", "5", "--long-documents", "chunk"], "not with --long-documents"),
        (["--quality", "x", "--rate", "5"], "unrecognized arguments: --rate 5"),
        (["--calibrate", "precision=0.9"], "--calibrate: needs --quality"),
    ],
)
def test_usage_errors_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as exc:
        bench_rerank.main(argv)
    assert exc.value.code == 2 and said in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys):
    assert bench_rerank.main(["--quality", "/no/such/file"]) == 2
    assert "/no/such/file: No such file" in capsys.readouterr().err


# --- comparison ---


def a_run(values, seed=0, **more):
    """Contents of --json with these nDCG values of queries."""
    queries = [{"id": str(i), "query": f"q{i}", "values": {"nDCG@10": v}} for i, v in enumerate(values)]
    row = {"metric": "nDCG@10", "value": sum(values) / len(values), "low": None, "high": None}
    base = {"kind": "quality", "seed": seed, "metrics": [row], "queries": queries, "failed_queries": 0}
    base |= {"interrupted": False, "relevant_grade": 1, "unjudged": "irrelevant", "pairs/s": 10.0, "model_root": "m"}
    return base | {"server_flags": "--dtype bfloat16"} | more


def test_compare_tells_a_loss_from_noise():
    rng = random.Random(3)
    base = [rng.random() * 0.8 for _ in range(100)]
    noisy = compare(a_run(base), a_run([v + rng.gauss(0, 0.02) for v in base]), 1.0)
    assert "no measurable difference" in noisy.lines[-1] or "no measurable difference" in noisy.lines[0]
    assert not noisy.worse and not noisy.untold
    lost = compare(a_run(base), a_run([v - 0.03 + rng.gauss(0, 0.02) for v in base]), 1.0)
    assert lost.worse and "worse (-0.0" in lost.worse[0]
    assert not compare(a_run(base), a_run([v - 0.001 for v in base]), 1.0).worse  # measurable, but less than 1 %
    assert not compare(a_run(base), a_run([v + 0.03 for v in base]), 1.0).worse
    same = compare(a_run(base), a_run(base), 1.0)
    assert "the same in every query" in same.lines[-1]


def test_compare_says_how_large_a_loss_cannot_be_excluded():
    rng = random.Random(4)
    base = [rng.random() for _ in range(25)]
    found = compare(a_run(base), a_run([v + rng.gauss(0, 0.1) for v in base]), 1.0)
    assert re.fullmatch(r"a loss of up to \d+\.\d % cannot be excluded with these queries", found.lines[-1])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (a_run([0.5] * 30, failed_queries=2), "the other run is not whole (2 failed queries)"),
        (a_run([0.5] * 29), "1 queries are in one run only"),
        (a_run([0.5] * 30, relevant_grade=2), "--relevant or --unjudged differ"),
        (a_run([0.5] * 30, metrics=[]), "the other run has no metrics"),
    ],
)
def test_the_gate_says_what_it_cannot_judge(other, said):
    assert said in compare(a_run([0.5] * 30), other, 1.0).untold


def test_compare_program_is_a_gate(tmp_path, capsys):
    rng = random.Random(5)
    base = [rng.random() for _ in range(50)]
    files = {}
    for name, run in (
        ("base", a_run(base)),
        ("same", a_run([v + rng.gauss(0, 0.001) for v in base], server_flags="--dtype float32")),
        ("worse", a_run([v * 0.9 for v in base], instruction="other")),
        ("few", a_run(base[:5])),
    ):
        files[name] = str(tmp_path / f"{name}.json")
        Path(files[name]).write_text(json.dumps(run))
    speed = {"model_root": "m", "server_flags": "--dtype bfloat16", "price_per_hour": 3.6}
    speed |= {"rows": [{"ok": 5, "interrupted": False, "pairs/s": v} for v in (100.0, 250.0)]}
    files["speed"] = str(tmp_path / "speed.json")
    Path(files["speed"]).write_text(json.dumps(speed))
    page = tmp_path / "page.html"

    def run(*names, more=("--fail-over", "1")):
        code = bench_rerank.main(["--compare", *(files[name] for name in names), *more])
        return code, capsys.readouterr()

    assert run("base", "same")[0] == 0
    code, shown = run("base", "worse", more=("--fail-over", "1", "--html", str(page)))
    assert code == 1 and "[ERR] loss of more than 1 %: nDCG@10" in shown.err
    assert "differs: instruction: None -> other" in shown.out
    assert run("base", "worse", more=("--fail-over", "20"))[0] == 0
    code, shown = run("base", "few")
    assert code == 2 and "--fail-over cannot judge" in shown.err and "5 common queries" in shown.err
    code, shown = run("base", "same", "speed")
    assert code == 0 and f"250.0 pairs/s ({files['speed']}), 4.00 per million pairs" in shown.out
    assert "10.0 pairs/s (the quality run)" in shown.out
    Balance(page.read_text())
    assert page.read_text().count("<svg") == 2


def test_a_load_test_belongs_to_the_same_model_and_flags():
    speed = {"model_root": "m", "server_flags": "other", "rows": [{"ok": 1, "interrupted": False, "pairs/s": 9.0}]}
    (row,) = frontier({"a": a_run([0.5] * 3)}, {"s": speed})
    assert (row["pairs/s"], row["speed_from"]) == (10.0, "the quality run")
