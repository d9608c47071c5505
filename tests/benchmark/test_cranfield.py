"""Quality on the Cranfield collection, which the kit does not have: CRANFIELD=FOLDER, or ../shared/cranfield."""

import json
import re
import subprocess
import sys

import pytest
from conftest import KIT, free_port, kit_environment, run_kit

from measurements import cranfield, results
from rerank_kit.benchmark.quality import judgements, metrics

NEEDED = (
    "the Cranfield collection is not in CRANFIELD=FOLDER or ../shared/cranfield (cran.all.1400, cran.qry, cranqrel)"
)
needs_cranfield = pytest.mark.skipif(cranfield.folder() is None, reason=NEEDED)


def of(way, metric, column="value"):
    return next(r[column] for r in results.read("quality-cranfield")[1] if (r["way"], r["metric"]) == (way, metric))


def test_the_service_ranks_as_sentence_transformers_on_the_same_lists():
    for metric in metrics.names_of(10):
        assert of("kit", metric) == pytest.approx(of("sentence-transformers", metric), abs=1e-3)
    for metric in ("binary nDCG@10", "binary MRR@10", "binary MAP"):
        assert of("kit", metric) == pytest.approx(of("RerankingEvaluator", metric), abs=1e-6)
    assert float(results.read("quality-cranfield")[0]["largest difference of a score"]) < 1e-4


def test_the_output_in_the_page_has_the_figures_of_the_file():
    """docs/quality.md; its table is compared by tests/docs/test_results.py."""
    page = (KIT / "docs" / "quality.md").read_text("utf-8")
    for metric in metrics.names_of(10):
        row = f"{of('kit', metric):.4f}  {of('kit', metric, 'low'):.4f} to {of('kit', metric, 'high'):.4f}"
        gain = f"{of('kit', metric, 'gain'):+.4f}"
        assert re.search(rf"^{metric} +{row} +{of('bm25', metric):.4f} +\{gain} ", page, re.M)


@needs_cranfield
def test_queries_are_numbered_by_place(tmp_path):
    """Read by their .I numbers they get the judgements of others, and BM25 finds nothing."""
    source = cranfield.folder()
    asked, judged = cranfield.queries(source), cranfield.grades(source)
    assert (len(asked), len(judged), len(cranfield.documents(source))) == (225, 225, 1400)
    assert set(judged) == set(asked) and {number for number, _ in asked.values()} != set(asked)
    cranfield.write(source, tmp_path)
    found = judgements.read(tmp_path)
    assert (len(found.queries), found.warnings[0]) == (225, "21206 of 22471 candidates are not judged (94%)")
    values = metrics.per_query(found.queries, [list(range(len(q.ids))) for q in found.queries], 10, 1)
    mean = sum(v["nDCG@10"] for v in values) / 225
    assert mean == pytest.approx(of("bm25", "nDCG@10"), abs=1e-4)


@needs_cranfield
@pytest.mark.soak
def test_the_demo_service_ranks_as_sentence_transformers_now(tmp_path):
    """python -m pytest -m soak tests/benchmark/test_cranfield.py; some minutes on 2 cores."""
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers==6.2.0")
    from rerank_kit.models.download import minilm

    cranfield.write(cranfield.folder(), tmp_path / "beir")
    settings = {"MODEL_PATH": minilm(), "PORT": free_port(), "LOG_DIR": tmp_path / "log", "DTYPE": "float32"}
    run = tmp_path / "run.json"
    try:
        started = run_kit("start", **settings)
        assert started.returncode == 0, started.stdout + started.stderr
        command = ["sh", str(KIT / "start_rerank.sh"), "quality", str(tmp_path / "beir"), "--sample", "60"]
        done = subprocess.run([*command, "--json", str(run)], env=kit_environment(**settings), timeout=1500)
        assert done.returncode == 0
    finally:
        run_kit("stop", **settings)
    table = tmp_path / "table.csv"
    program = [sys.executable, str(KIT / "measurements" / "cranfield.py"), "reference"]
    subprocess.run([*program, str(run), str(tmp_path / "beir"), str(settings["MODEL_PATH"]), str(table)], check=True)
    rows = [line.split(",") for line in table.read_text().splitlines() if not line.startswith("#")]
    value = {(row[0], row[1]): float(row[3]) for row in rows[1:]}
    assert value["kit", "nDCG@10"] == pytest.approx(value["sentence-transformers", "nDCG@10"], abs=1e-3)
    assert json.loads(run.read_text())["profile"] == "embedding"
