"""measurements/two_stages.py and packaged_models.py: what they compute. Nothing is downloaded or started."""

import sys
from types import SimpleNamespace

import numpy
import pytest

from measurements import packaged_models, two_stages
from rerank_kit.benchmark.quality.judgements import Judged


def test_the_large_model_ranks_what_the_first_stage_kept():
    first, large = [2, 0, 1, 3], [0.1, 0.9, 0.2, 0.8]
    assert two_stages.staged(first, large, 2) == [2, 0, 1, 3], "0.2 before 0.1, then as the first stage has them"
    assert two_stages.staged(first, large, 3) == [1, 2, 0, 3]
    assert two_stages.staged(first, large, 9) == [1, 3, 2, 0], "all kept: the large model alone"
    assert two_stages.staged([3, 2], [0, 0, 0.5, 0.5], 2) == [2, 3], (
        "equal scores in input order, as rerank() gives them"
    )


def runs():
    """Six queries of 60 documents; the small model knows the relevant one nearly, the large one exactly."""
    queries, small, large = [], [], []
    for n in range(6):
        ids = [f"d{i}" for i in range(60)]
        good = 7 * n + 5
        queries.append(Judged(f"q{n}", "text", ids, ids, {f"d{good}": 1}))
        near = [1.0 - abs(i - good - n % 3) / 100 for i in range(60)]
        small.append({"id": f"q{n}", "ids": ids, "scores": near})
        large.append({"id": f"q{n}", "ids": ids, "scores": [float(i == good) for i in range(60)]})
    return queries, {"scored": small}, {"scored": large[:5]}


def test_quality_compares_each_way_on_the_common_queries():
    queries, small, large = runs()
    rows = {(r["way"], r["keep"], r["metric"]): r for r in two_stages.quality(queries, small, large)}
    assert {row["queries"] for row in rows.values()} == {5}
    both = rows["small, large", 10, "nDCG@10"]
    assert rows["large", None, "nDCG@10"]["value"] == both["value"] == 1 and both["to_large"] == 0
    assert rows["small", None, "nDCG@10"]["value"] < 1 and rows["small", None, "nDCG@10"]["to_large"] < 0
    assert rows["bm25, large", 10, "nDCG@10"]["value"] == pytest.approx(1 / 5), "BM25 keeps one of five"
    assert (both["small_pairs"], both["large_pairs"]) == (60, 10)
    assert rows["large", None, "MAP"]["large_pairs"] == 60 and rows["bm25", None, "MAP"]["large_pairs"] == 0


def test_runs_of_other_candidates_are_refused():
    queries, small, large = runs()
    small["scored"][0]["ids"] = small["scored"][0]["ids"][::-1]
    with pytest.raises(SystemExit, match="query q0: the runs have other candidates"):
        two_stages.quality(queries, small, large)
    with pytest.raises(SystemExit, match="no query in common"):
        two_stages.quality(queries, {"scored": []}, large)


def test_each_call_is_timed_with_what_the_small_model_keeps(monkeypatch):
    queries, small, _ = runs()
    calls = []
    monkeypatch.setattr(two_stages, "rerank", lambda query, documents, base_url: calls.append((base_url, documents)))
    took = two_stages.timed(queries[:3], small, "URL")
    assert {name: len(values) for name, values in took.items()} == {"all": 3, "10": 3, "20": 3}
    assert calls[0] == calls[1] == ("URL", queries[0].documents), "one call before, then all of the first query"
    near = sorted(range(60), key=lambda i: (abs(i - 5), i))[:10]
    assert calls[2][1] == [queries[0].documents[i] for i in sorted(near)], "in input order, as first= sends them"
    assert [len(documents) for _, documents in calls[4:7]] == [10, 20, 60], "another one begins each turn"


def test_the_calls_of_two_stages_are_added():
    small, large = {"all": [1.0, 2.0, 3.0]}, {"all": [10.0, 20.0, 30.0], "10": [4.0, 5.0, 9.0], "20": [7.0, 7.0, 7.0]}
    rows = {(row["way"], row["keep"]): row for row in two_stages.cost_rows(small, large)}
    assert rows["small, large", 10]["value"] == 7 and rows["small, large", 20]["value"] == 9
    assert (rows["small", None]["of_large"], rows["large", None]["of_large"]) == (0.1, 1)


def test_weights_are_found_by_name_and_by_the_path_of_their_node(monkeypatch):
    """As the exporter writes them: a matrix that it transposed has a number for a name, and maybe 8 bits."""
    held = {
        "bert.embeddings.word_embeddings.weight_quantized": numpy.array([[130, 126]], numpy.uint8),
        "bert.embeddings.word_embeddings.weight_zero_point": numpy.array(128, numpy.uint8),
        "bert.embeddings.word_embeddings.weight_scale": numpy.array(0.5, numpy.float32),
        "bert.encoder.layer.0.output.dense.bias": numpy.array([7.0], numpy.float32),
        "onnx::MatMul_1_quantized": numpy.array([[1, 2], [3, -4]], numpy.int8),
        "onnx::MatMul_1_zero_point": numpy.array(0, numpy.int8),
        "onnx::MatMul_1_scale": numpy.array(2.0, numpy.float32),
        "onnx::MatMul_2": numpy.array([[5.0, 6.0]], numpy.float32),
    }
    helper = SimpleNamespace(to_array=lambda tensor: held[tensor.name])
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(numpy_helper=helper))
    nodes = (
        ("MatMulInteger", "/bert/encoder/layer.0/output/dense/MatMul_quant", "onnx::MatMul_1_quantized"),
        ("MatMul", "/classifier/MatMul", "onnx::MatMul_2"),
        ("MatMul", "/bert/encoder/layer.0/attention/self/MatMul", "another node's output"),
    )
    graph = SimpleNamespace(
        initializer=[SimpleNamespace(name=name) for name in held],
        node=[SimpleNamespace(op_type=kind, name=name, input=["x", weight]) for kind, name, weight in nodes],
    )
    found = {name: value.tolist() for name, value in packaged_models.weights(graph).items()}
    assert found == {
        "embeddings.word_embeddings.weight": [[1.0, -1.0]],
        "encoder.layer.0.output.dense.bias": [7.0],
        "encoder.layer.0.output.dense.weight": [[2.0, 6.0], [4.0, -8.0]],
        "classifier.weight": [[5.0], [6.0]],
    }
